"""Every model through the whole of a conversion: ``python -m tests.sweep --help``."""
