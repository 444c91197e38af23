"""A source into an Arrow dataset with splits, a chunk of trials at a time, on several processes."""

from b2t.data.prepare.assemble import RECORD, VERSION, arrow_state, combined_fingerprint
from b2t.data.prepare.options import PrepareOptions, source_options
from b2t.data.prepare.run import prepare
from b2t.data.prepare.splits import assign_splits
from b2t.data.prepare.work import Reopen

__all__ = [
    "RECORD",
    "VERSION",
    "PrepareOptions",
    "Reopen",
    "arrow_state",
    "assign_splits",
    "combined_fingerprint",
    "prepare",
    "source_options",
]
