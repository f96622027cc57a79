"""The speed of reading images."""
