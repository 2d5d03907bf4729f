"""Make the runs on real logs, and the page docs/results.md from them."""
