"""Weights that are powers of two."""
