"""Measurements as text, plots and HTML pages."""
