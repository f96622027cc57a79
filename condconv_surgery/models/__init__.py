"""Where models come from and where they go: names, files, artifacts."""
