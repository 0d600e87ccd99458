"""Drop-in attention modules, rotary embeddings and key/value caches: of frames, and of tokens within a budget."""

from .attention import CrossAttention, SelfAttention
from .cache import FrameKVCache
from .control import AttentionControl
from .norm_rope import norm_rope
from .rope import RoPE2D, rotate_last
from .token_cache import TokenKVCache

__all__ = [
    "AttentionControl",
    "CrossAttention",
    "FrameKVCache",
    "RoPE2D",
    "SelfAttention",
    "TokenKVCache",
    "norm_rope",
    "rotate_last",
]
