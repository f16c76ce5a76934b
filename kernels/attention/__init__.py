"""Attention over tokens that have sizes, and the informativeness it gives."""
