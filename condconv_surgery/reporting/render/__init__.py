"""Reports as text, plots and pages."""
