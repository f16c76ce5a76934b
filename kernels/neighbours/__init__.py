"""What the neighbours of a token in their grid say."""
