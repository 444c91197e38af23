"""What could make a score too good: checks of a dataset, each on its own."""

from b2t.evaluate.audit.findings import CRITICAL, NOTE, WARNING, Finding
from b2t.evaluate.audit.sentences import shared_sentences

__all__ = ["CRITICAL", "NOTE", "WARNING", "Finding", "shared_sentences"]
