"""Benchmarks of conditional layers, as ratios within one run: ``python -m benchmarks --help``."""
