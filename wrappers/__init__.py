"""Wrappers of denoising environments."""
