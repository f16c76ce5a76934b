"""Layers of which each token takes one of two."""
