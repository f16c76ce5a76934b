"""Which tokens stay, by a score of each."""
