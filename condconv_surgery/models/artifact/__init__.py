"""The file that ``save`` writes and ``load`` reads."""
