"""Combining the tokens of a group into one."""
