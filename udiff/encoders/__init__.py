"""Frozen encoders that others learn from."""
