"""Measurements: `make bench` and `make chaos`. Nothing here asserts a speed."""
