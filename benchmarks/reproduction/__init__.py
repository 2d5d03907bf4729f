"""The runs on real logs behind docs/results.md."""
