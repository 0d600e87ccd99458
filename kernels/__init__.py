"""Kernels, one folder per operation; installed as ``gate4d.kernels``."""
