"""Time, memory and accuracy of mctf against the dense model."""
