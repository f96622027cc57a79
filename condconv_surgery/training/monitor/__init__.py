"""What a person sees of a run, and why it failed."""
