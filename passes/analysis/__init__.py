"""What a graph is: its operators, axes, blocks and masks. Nothing is decided or changed."""
