"""Names of `b2t.records`, which holds the code."""

from b2t.records import JsonlSink, read_jsonl, rewind

__all__ = ["JsonlSink", "read_jsonl", "rewind"]
