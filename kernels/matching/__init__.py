"""Multi-criteria bipartite matching."""
