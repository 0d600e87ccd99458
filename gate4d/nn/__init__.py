"""Drop-in attention modules, rotary embeddings and the frame KV cache."""

from .attention import CrossAttention, SelfAttention
from .cache import FrameKVCache
from .control import AttentionControl
from .norm_rope import norm_rope
from .rope import RoPE2D, rotate_last

__all__ = ["AttentionControl", "CrossAttention", "FrameKVCache", "RoPE2D", "SelfAttention", "norm_rope", "rotate_last"]
