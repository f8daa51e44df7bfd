"""Measure parbake's speed and size on this machine: ``python -m bench --help``."""
