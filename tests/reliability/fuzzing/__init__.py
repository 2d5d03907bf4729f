"""Random arguments and random files, and the checks of what the package makes of them."""
