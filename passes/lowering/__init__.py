"""What runs the rewritten graph's operators, and how it is cut for compilation."""
