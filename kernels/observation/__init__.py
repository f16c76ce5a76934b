"""What a module that was attached to a model says of its tokens."""
