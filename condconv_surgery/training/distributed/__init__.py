"""Runs of several processes: collectives and sharding."""
