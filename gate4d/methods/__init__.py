"""The systems, end to end, over gate4d's primitives."""

from .easi3r import Easi3r, Easi3rPass, Easi3rResult
from .method import ClipMethod, ClipResult
from .more import More, MoreFrame, MoreResult, MoreStream
from .mut3r import Mut3r, Mut3rFrame, Mut3rResult
from .ttt3r import Ttt3r, Ttt3rFrame, Ttt3rResult
from .vggt4d import Vggt4d, Vggt4dResult

__all__ = [
    "ClipMethod",
    "ClipResult",
    "Easi3r",
    "Easi3rPass",
    "Easi3rResult",
    "More",
    "MoreFrame",
    "MoreResult",
    "MoreStream",
    "Mut3r",
    "Mut3rFrame",
    "Mut3rResult",
    "Ttt3r",
    "Ttt3rFrame",
    "Ttt3rResult",
    "Vggt4d",
    "Vggt4dResult",
]
