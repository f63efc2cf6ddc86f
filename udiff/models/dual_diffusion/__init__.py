"""Dual Diffusion: one transformer for flow matching of images and masked diffusion of text."""
