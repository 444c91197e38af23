"""What is wrong with a dataset, or could make a score too good: checks, each on its own."""

from b2t.evaluate.audit.checks import Audit, AuditOptions, Subject, audit, is_clean, verdict
from b2t.evaluate.audit.findings import CRITICAL, NOTE, WARNING, Finding, worst
from b2t.evaluate.audit.sentences import shared_sentences

__all__ = [
    "CRITICAL", "NOTE", "WARNING", "Audit", "AuditOptions", "Finding", "Subject", "audit",
    "is_clean", "shared_sentences", "verdict", "worst",
]  # fmt: skip
