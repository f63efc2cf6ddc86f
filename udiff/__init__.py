"""Image-text data from raw web shards to a served diffusion model."""
