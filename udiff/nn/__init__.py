"""Leaf layers that more than one network uses with identical numerics."""
