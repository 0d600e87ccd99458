"""Command line: ``gate4d info | bench | demo``."""
