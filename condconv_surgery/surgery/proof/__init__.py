"""The proof of a conversion: run both models, compare their outputs, tell rounding from errors."""
