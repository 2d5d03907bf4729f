"""The first run on a GPU."""
