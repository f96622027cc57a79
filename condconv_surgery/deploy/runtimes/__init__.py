"""Runtimes: how each writes a graph and runs its file."""
