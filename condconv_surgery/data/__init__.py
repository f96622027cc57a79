"""Labelled images of folders, shards and data sets by name. Training and reports read them here."""
