"""The artifact: the file that ``save`` writes and ``load`` reads."""
