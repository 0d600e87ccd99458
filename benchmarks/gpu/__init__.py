"""Measurements on a CUDA device: ``python -m gate4d.benchmarks.gpu``. None of them has been run on one yet."""
