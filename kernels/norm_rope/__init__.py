"""LayerNorm over the head dimension, RoPE-2D and the append to a cache, in one pass over memory."""
