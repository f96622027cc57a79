"""From labelled images to the batches of one process."""
