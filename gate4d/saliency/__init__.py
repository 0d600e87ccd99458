"""Motion saliency of the supported systems, from attention statistics."""

from .cues import motion_cue, state_confidence
from .gram import GramMap, GramRecipe, GramResult, GramSaliency
from .pairs import PairMaps, PairSaliency

__all__ = [
    "GramMap",
    "GramRecipe",
    "GramResult",
    "GramSaliency",
    "PairMaps",
    "PairSaliency",
    "motion_cue",
    "state_confidence",
]
