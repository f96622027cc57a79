"""Labelled images, wherever they lie: folders, shards, data sets by name. Training and reports read them here."""
