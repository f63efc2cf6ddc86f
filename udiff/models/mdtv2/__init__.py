"""MDTv2 and MDT: Masked Diffusion Transformers (arXiv 2303.14389)."""
