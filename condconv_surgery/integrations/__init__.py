"""Other people's trainers, each in a file named after its package, imported only by whom it serves."""
