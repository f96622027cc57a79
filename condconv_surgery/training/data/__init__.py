"""From a folder, shards or a data set by name to batches."""
