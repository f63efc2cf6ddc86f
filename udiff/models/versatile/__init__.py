"""Versatile Diffusion (arXiv 2211.08332): several flows of one network, and their mixes."""
