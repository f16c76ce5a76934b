"""What mctf gains, over tables of workloads: ``python -m benchmarks``."""
