"""Giving every token its group's value back."""
