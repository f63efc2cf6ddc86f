"""Kinds of sources that pictures come from."""
