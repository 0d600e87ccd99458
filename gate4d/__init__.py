"""Motion-aware, fast attention for 3D reconstruction transformers."""

from .functional import AttentionAux, explain, gated_attention
from .gates import MotionGate
from .handle import Handle, patch, register_method, unpatch
from .integrations import inspect
from .moments import Moments
from .statistics import (
    GramMap,
    GramRecipe,
    GramResult,
    GramSaliency,
    PairMaps,
    PairSaliency,
    cross_moments,
    logit_moments,
    motion_cue,
    received_attention,
    state_confidence,
)
from .visibility import TokenLayout, Visibility

__version__ = "0.1.0"

__all__ = [
    "AttentionAux",
    "GramMap",
    "GramRecipe",
    "GramResult",
    "GramSaliency",
    "Handle",
    "Moments",
    "MotionGate",
    "PairMaps",
    "PairSaliency",
    "TokenLayout",
    "Visibility",
    "__version__",
    "cross_moments",
    "explain",
    "gated_attention",
    "inspect",
    "logit_moments",
    "motion_cue",
    "patch",
    "received_attention",
    "register_method",
    "state_confidence",
    "unpatch",
]
