"""Mean and variance per key of the attention probabilities, recomputed from lse."""
