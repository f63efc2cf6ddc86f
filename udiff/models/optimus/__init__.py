"""Optimus (arXiv 2004.04092): an autoencoder of texts."""
