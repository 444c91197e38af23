"""Recordings: sources, simulation, Arrow datasets, augmentation, batches."""
