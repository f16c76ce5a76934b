"""Linear attention on binary queries and keys."""
