"""Serving: a thin HTTP front and an engine replica per device, on Ray Serve."""
