"""How to convolve with one kernel for each sample: one operation, its implementations and its backends."""
