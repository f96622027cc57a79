"""Peers that compute the same operation: C++ and Triton beside eager torch."""
