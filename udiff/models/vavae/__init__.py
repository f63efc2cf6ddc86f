"""VA-VAE: autoencoders aligned with vision foundation models (arXiv 2501.01423)."""
