"""Exports of whole networks to each runtime, and the table of them."""
