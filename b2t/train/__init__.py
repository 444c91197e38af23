"""Phased training under DeepSpeed."""
