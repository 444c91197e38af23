"""b2t: brain-to-text training at scale."""

from b2t.auto_classes import register

__version__ = "0.1.0"

register()
