"""Small models of this library, and their weights."""

from .files import MODELS, WeightsError, build, load, metadata, save_weights

__all__ = ["MODELS", "WeightsError", "build", "load", "metadata", "save_weights"]
