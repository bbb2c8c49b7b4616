"""Benchmarks: one file each; every one prints a ratio against a named baseline measured in the same call."""
