"""What is to be fused where, and what it costs."""
