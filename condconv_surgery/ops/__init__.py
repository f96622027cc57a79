"""How to convolve with a kernel of each sample's own: one operation, its implementations and its backends."""
