"""One-step-ahead attention through the fusion map."""
