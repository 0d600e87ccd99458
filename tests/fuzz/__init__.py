"""Random calls of the operators against an oracle written apart from the package: ``make fuzz MINUTES=30``."""
