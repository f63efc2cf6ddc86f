"""LightningDiT (arXiv 2501.01423)."""
