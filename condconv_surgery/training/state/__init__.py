"""The files of a run on disk, and resuming from them."""
