"""Linear layers whose weights nothing will change."""
