"""Loading and saving models: names, checkpoints, artifacts, layouts of other implementations."""
