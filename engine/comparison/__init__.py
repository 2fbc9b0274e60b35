"""Comparing methods on small image sets with known noise: run, collect, report."""
