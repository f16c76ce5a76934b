"""Pictures of what fusion does: plots of a report, tokens on their image, and a page about a model."""
