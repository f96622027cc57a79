"""Files that other programs wrote: what they are, what they hold, which architecture they fit."""
