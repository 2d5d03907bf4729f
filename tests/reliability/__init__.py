"""Tests that try to break the package: each part counts what it tried, what failed and what was lost."""

# This puts the installed package before the bare sources, as benchmarks/__init__.py explains.
import benchmarks  # noqa: F401
