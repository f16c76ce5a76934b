"""Other parts in the place of a model's own, before anything is fused: what modules that were attached to it learn."""
