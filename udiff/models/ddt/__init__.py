"""DDT: Decoupled Diffusion Transformer (arXiv 2504.05741)."""
