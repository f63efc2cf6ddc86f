"""Caches between the stages: where they are kept, their columns and their manifests."""
