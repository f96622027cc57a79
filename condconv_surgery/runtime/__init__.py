"""Running somebody else's model: snapshots of its state, the meta device, train and eval mode."""
