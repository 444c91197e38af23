"""b2t: brain-to-text training at scale."""

__version__ = "0.1.0"
