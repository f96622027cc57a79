"""Batches of labelled images for one process: samplers, loaders, transforms."""
