"""The graph emitted anew, on fused tokens."""
