"""The brain-to-text model and its components."""
