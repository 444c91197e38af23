"""Decoding, error rates, controls and codebook use of a trained model."""
