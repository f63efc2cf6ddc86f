"""KL autoencoder trained on reconstruction and KL alone (arXiv 2112.10752)."""
