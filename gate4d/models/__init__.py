"""Small models of this library, and their weights."""

from .files import MODELS, WeightsError, build, load, metadata, save_weights

TRAINED_PATCHES = 80  # of a frame, 64 x 80 pixels: the size that the shipped weights were trained at

__all__ = ["MODELS", "TRAINED_PATCHES", "WeightsError", "build", "load", "metadata", "save_weights"]
