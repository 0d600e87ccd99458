"""Measurements: shapes of real models, peers, and the targets; installed as ``gate4d.benchmarks``."""
