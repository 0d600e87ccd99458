"""Mean and variance of attention, before and after the softmax, without its maps; the motion saliency made of them."""

from .cross import cross_moments
from .cues import motion_cue, state_confidence
from .gram import GramMap, GramRecipe, GramResult, GramSaliency
from .logits import logit_moments
from .pairs import PairMaps, PairSaliency
from .received import received_attention

__all__ = [
    "GramMap",
    "GramRecipe",
    "GramResult",
    "GramSaliency",
    "PairMaps",
    "PairSaliency",
    "cross_moments",
    "logit_moments",
    "motion_cue",
    "received_attention",
    "state_confidence",
]
