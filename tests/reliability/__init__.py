"""Tests that try to break the package: each part counts what it tried, what failed and what was lost."""
