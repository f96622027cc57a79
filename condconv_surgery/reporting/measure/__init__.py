"""Measurements of a model: parameters, MACs, memory, latency, experts and routing."""
