"""What commands print, and the paths that they write."""
