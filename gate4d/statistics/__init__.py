"""Mean and variance of attention, before and after the softmax, without its maps."""

from .cross import cross_moments
from .logits import logit_moments
from .received import received_attention

__all__ = ["cross_moments", "logit_moments", "received_attention"]
