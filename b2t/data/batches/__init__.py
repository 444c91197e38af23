"""Trials to batches: collation, length-grouped order, loading with worker processes."""

from b2t.data.batches.batch import Batch, Example, collate
from b2t.data.batches.loading import eval_batches, train_batches
from b2t.data.batches.order import BatchPlan, Budget, evaluation_batches
from b2t.data.batches.rows import TrialRows, encode_texts
from b2t.data.batches.sentences import SentenceRows, sentence_batches
from b2t.data.batches.streamed import StreamedTrials

__all__ = [
    "Batch",
    "BatchPlan",
    "Budget",
    "Example",
    "SentenceRows",
    "StreamedTrials",
    "TrialRows",
    "collate",
    "encode_texts",
    "eval_batches",
    "evaluation_batches",
    "sentence_batches",
    "train_batches",
]
