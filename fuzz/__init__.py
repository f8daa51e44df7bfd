"""Random bytes, led by coverage, for everything that reads what others wrote: ``python -m fuzz --help``."""
