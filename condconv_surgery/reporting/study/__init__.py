"""The statistics of a study and its verdict, from its record alone."""
