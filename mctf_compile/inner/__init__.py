"""The inner compiler: the graph as a whole, or region by region."""
