"""pytest-benchmark levels: operations, modules, systems. ``gate4d bench suite`` runs them and compares the ratios."""
