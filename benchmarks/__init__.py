"""What conditional layers cost, as ratios from one run: ``python -m benchmarks --help``."""
