"""What all adapters share: the replaced computation of one attention module, and the proof that it is the same one.

An adapter is a class per call convention. It is recognised by structure (child modules, parameter names of the
method it replaces), then exercised: a detached copy of the module and the replacement run on the same few random
tokens and must agree. So a fork that kept the names but changed the computation is refused, not silently altered.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.attention import fused_heads, split_heads, split_qkv
from ..nn.cache import FrameKVCache, Slot
from ..nn.control import AttentionControl
from ..nn.eviction import LayerBudgets, Policy, Score, policy_of
from ..nn.norm_rope import fuses
from ..nn.rope import RoPE2D
from ..nn.token_cache import TokenKVCache
from ..visibility import Visibility
from .masks import recognise

SELF_PARTS = ("qkv", "proj")
CROSS_PARTS = ("projq", "projk", "projv", "proj")
# Held while modules are looked at and replaced: one thread at a time, so that each sees a model patched or not patched.
PATCHING = threading.RLock()
_IDENTITY = nn.Identity()
_LEFT_OUT = object()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Traits:
    """What the exercise found out about a module beyond its names.

    Attributes:
        rope: what rotates q and k: a :class:`RoPE2D` where the module's own embedding is one, None for the
            module's own.
        rotate_dtype: dtype into which the module casts q and k before RoPE (CUT3R's encoder: float16), None for none.
    """

    rope: RoPE2D | None = None
    rotate_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Options:
    """Options of ``patch`` that adapters read.

    Attributes:
        window: frames a streaming model's cache keeps, the current one included; None keeps all, as upstream does.
        anchors: leading frames kept beside the window, or that never leave a cache with a budget; None is 0, or what
            the policy says.
        budget: tokens a head that a layer's cache keeps, on average over the layers; see
            :class:`gate4d.nn.TokenKVCache`.
        policy, specials: of that cache; None is "infinite".
        layers: the budgets of the streams that run, made here.

    Raises:
        ValueError, TypeError: a number is out of range, or an option has no effect without another.
    """

    window: int | None = None
    anchors: int | None = None
    budget: int | None = None
    policy: str | Policy | Score | None = None
    specials: int = 0
    layers: StreamBudgets = field(default_factory=lambda: StreamBudgets(), init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Raises where the cache would, but before the first frame.
        FrameKVCache(self.window, anchors=self.anchors or 0)
        if self.budget is None:
            if self.policy is not None or self.specials:
                raise ValueError("policy and specials belong to a budget: give budget=TOKENS, too.")
            if self.anchors and self.window is None:
                raise ValueError(
                    f"anchors={self.anchors} has no effect without a window: a cache without one keeps all."
                )
            return
        if self.window is not None:
            raise ValueError('give window or budget, not both: a window in tokens is policy="window".')
        object.__setattr__(self, "policy", policy_of("infinite" if self.policy is None else self.policy))
        TokenKVCache(self.budget, self.policy, anchors=self.anchors, specials=self.specials)
        self.layers.budget, self.layers.by_diversity = self.budget, self.policy.by_diversity


class StreamBudgets:
    """The budgets that the layers of a model share, of each stream anew."""

    def __init__(self) -> None:
        self.budget, self.by_diversity = 1, False
        self._newest: LayerBudgets | None = None
        self._members: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_newest": None, "_members": set()}  # the layers of a copy are others

    def of_stream(self, layer: object) -> LayerBudgets:
        """What the layer's new cache shares: a stream begins when a layer asks that has part in the newest one."""
        if self._newest is None or id(layer) in self._members:
            self._newest, self._members = LayerBudgets(self.budget, by_diversity=self.by_diversity), set()
        self._members.add(id(layer))
        return self._newest


class PatchedAttention(AttentionControl):
    """Replaces one method of one attention module; lives in the module's ``__dict__``, holds no tensors.

    A plain object with a reference to its module: ``copy.deepcopy`` and ``pickle`` carry it along with the module, and
    parameters, buffers, hooks and the class of the module are not touched.
    """

    family: ClassVar[str]
    kind: ClassVar[str] = "self"
    attribute: ClassVar[str] = "forward"
    parameters: ClassVar[tuple[str, ...]]  # of the replaced method, without self
    casts: ClassVar[bool] = False  # whether q and k are cast to the dtype of v between norm and RoPE
    returns_qk: ClassVar[bool] = False  # whether q and k leave the attention in the dtype they have there

    def __init__(self, module: nn.Module, traits: Traits = Traits(), options: Options = Options()):
        super().__init__()
        self.module = module
        self.traits = traits
        self.exact_rope = None if traits.rope is None else RoPE2D(traits.rope.base, traits.rope.scale)
        self.options = options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the module has this convention's parts and the replaced method its parameters."""
        parts = SELF_PARTS if cls.kind == "self" else CROSS_PARTS
        return all(hasattr(module, p) for p in parts) and method_parameters(module, cls.attribute) == cls.parameters

    @classmethod
    def windowed(cls, module: nn.Module) -> bool:
        """Whether the options of a cache (``window``, ``budget``, ...) apply to the module."""
        return False

    @staticmethod
    def exercise(call: Callable[..., Any], sample: Sample) -> list[Tensor]:
        """Outputs of the replaced method on a sample, for the comparison; statistics reduced to what is read."""
        raise NotImplementedError

    # The order of every family: projection, norm, (cast,) RoPE, attention, heads concatenated, proj, proj_drop.

    def project(self, x: Tensor, pos: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``x [B, N, C]`` to q, k, v ``[B, H, N, D]`` after q/k-norm and RoPE."""
        return self.project_into(x, pos, None)[:3]

    def project_into(self, x: Tensor, pos: Tensor | None, cache: FrameKVCache | None):
        """:meth:`project`, and the cache or its slot that holds k and v already; see :func:`fused_heads`."""
        return self._turned(*split_qkv(self.module.qkv(x), self.module.num_heads), pos, pos, cache)

    def project_cross(self, query: Tensor, key: Tensor, value: Tensor, qpos: Tensor | None, kpos: Tensor | None):
        """``[B, Nq, C]``, ``[B, Nk, C]``, ``[B, Nk, C]`` to q, k, v ``[B, H, N, D]`` after RoPE."""
        module, heads = self.module, self.module.num_heads
        q, k, v = module.projq(query), module.projk(key), module.projv(value)
        return self._turned(*(split_heads(x, heads) for x in (q, k, v)), qpos, kpos)[:3]

    def _turned(self, q, k, v, qpos, kpos, cache=None) -> tuple[Tensor, Tensor, Tensor, FrameKVCache | Slot | None]:
        norms = tuple(getattr(self.module, name, None) for name in ("q_norm", "k_norm"))
        norms = tuple(_IDENTITY if n is None else n for n in norms)
        if self._fuses(q, k, norms, qpos, kpos):
            positions = (None, None) if self.exact_rope is None else (qpos, kpos)
            return fused_heads(q, k, v, norms, self.exact_rope, positions, cache)
        q, k = norms[0](q), norms[1](k)
        if self.casts:
            q, k = q.to(v.dtype), k.to(v.dtype)
        return *self.rotate(q, k, qpos, kpos), v, cache

    def _fuses(self, q: Tensor, k: Tensor, norms, qpos: Tensor | None, kpos: Tensor | None) -> bool:
        """Whether one kernel a side gives q and k as the module's own norm and RoPE do, or with fewer roundings.

        Under autocast LayerNorm returns fp32, which attention rounds to 16 bits, as the kernel does at once: the same
        unless something else reads q and k.
        """
        if not all(fuses(x, norm, None) for x, norm in zip((q, k), norms, strict=True)):
            return False
        normed = any(type(n) is nn.LayerNorm for n in norms)
        widened = normed and q.dtype.itemsize == 2 and torch.is_autocast_enabled(q.device.type)
        if widened and (self.returns_qk or self.observers or callable(self.gate) or callable(self.visible)):
            return False
        turned = [] if getattr(self.module, "rope", None) is None else [p for p in (qpos, kpos) if p is not None]
        if not turned:
            return normed
        if self.traits.rope is None or any(p.is_floating_point() for p in turned):
            return False
        turned_in = self.traits.rotate_dtype or (torch.float32 if widened and not self.casts else q.dtype)
        # A RoPE that computes in the dtype of its tokens is the exact one where they are fp32.
        return turned_in == torch.float32 or (turned_in == q.dtype and self.traits.rope.exact)

    def rotate(self, q: Tensor, k: Tensor, qpos: Tensor | None, kpos: Tensor | None) -> tuple[Tensor, Tensor]:
        """RoPE in the dtype the module uses; positions None leave a side as it is."""
        rope = getattr(self.module, "rope", None)
        if rope is None:
            return q, k
        dtype = q.dtype
        if self.traits.rotate_dtype is not None:
            q, k = q.to(self.traits.rotate_dtype), k.to(self.traits.rotate_dtype)
        if self.traits.rope is not None:
            q, k = self.traits.rope.pair(q, k, qpos, kpos)
        else:
            q = q if qpos is None else rope(q, qpos)
            k = k if kpos is None else rope(k, kpos)
        return q.to(dtype), k.to(dtype)

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Visibility | None) -> Tensor:
        """Attention under the model's own mask, heads concatenated: ``[B, Nq, H * Dv]``."""
        if isinstance(mask, Tensor):
            visible = recognise(mask, q.shape[2], k.shape[2])
            if visible is None:
                return self.dense(q, k, v, mask, scale=self.scale).transpose(1, 2).flatten(2)
            mask = visible
        return self.attend(q, k, v, scale=self.scale, visible=mask)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **call: Any) -> Tensor:
        """torch's own attention ``[B, H, Nq, Dv]``, for what is no visibility; observers see q and k all the same.

        Raises:
            ValueError: a gate, a visibility or a cache is set here, which it could not take into account.
        """
        if self.gate is not None or self.visible is not None or self.cache is not None:
            raise ValueError(
                "the model's own mask, dropout or causality is no interval of keys: "
                "it cannot be combined with a gate, a visibility or a cache."
            )
        scale = call.get("scale")
        for observe in self.observers:
            observe(q, k, q.shape[-1] ** -0.5 if scale is None else scale)
        self.tokens = (q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **call)

    def output(self, x: Tensor) -> Tensor:
        """``[B, Nq, C]`` through proj and proj_drop."""
        x = self.module.proj(x)
        drop = getattr(self.module, "proj_drop", None)
        return x if drop is None else drop(x)

    @property
    def scale(self) -> float | None:
        scale = getattr(self.module, "scale", None)
        return None if scale is None else float(scale)


class Sample:
    """Random tokens and positions for an exercise, in the module's dtype and on its device; 2 frames of 6 tokens."""

    frames, tokens = 2, 6

    def __init__(self, module: nn.Module):
        device, dtype = place(module)
        generator = torch.Generator().manual_seed(0)
        dim = next(m.in_features for m in (getattr(module, n, None) for n in ("qkv", "projq")) if m is not None)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

        self.x, self.y = draw(2, self.frames * self.tokens, dim), draw(2, self.frames * self.tokens + 1, dim)
        self.head_dim = dim // module.num_heads
        frame = torch.cartesian_prod(torch.arange(3), torch.arange(2))
        self.pos = frame.repeat(2, self.frames, 1).to(device)  # [2, frames * tokens, 2]
        self.pos_y = torch.cat((torch.zeros_like(self.pos[:, :1]), self.pos + 1), dim=1)
        self.has_rope = getattr(module, "rope", None) is not None

    @property
    def positions(self) -> Tensor | None:
        return self.pos if self.has_rope else None


def method_parameters(module: nn.Module, attribute: str) -> tuple[str, ...] | None:
    """Parameter names of the class's method, without self; None if there is no such method."""
    function = getattr(type(module), attribute, None)
    if function is None:
        return None
    try:
        return tuple(inspect.signature(function).parameters)[1:]
    except (TypeError, ValueError):
        return None


def place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of what a module computes with: of its first floating-point parameter or buffer.

    A dynamically quantised module may have neither; it takes and gives fp32 on the CPU.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    first = next((x for x in tensors if x.is_floating_point()), None)
    return (torch.device("cpu"), torch.float32) if first is None else (first.device, first.dtype)


def examine(adapter: type[PatchedAttention], module: nn.Module) -> tuple[Traits, str | None]:
    """Exercise a copy of the module and the replacement of another copy side by side.

    Returns:
        The traits found, and None or the reason why the replacement does not compute the same.
    """
    if any(p.is_meta for p in module.parameters()):
        return Traits(rope=_adopt_rope(module)), None
    try:
        twin = detached_copy(module, share=True)
    except Exception as e:
        return Traits(), f"it cannot be copied for a trial run: {type(e).__name__}: {e}"
    with torch.no_grad(), torch.autocast(place(module)[0].type, enabled=False):
        # Each side starts from a copy of its own: the calls of one may change what is kept in the module.
        return _run_both(adapter, twin, lambda: detached_copy(module, share=True))


def _run_both(
    adapter: type[PatchedAttention], twin: nn.Module, another: Callable[[], nn.Module]
) -> tuple[Traits, str | None]:
    sample = Sample(twin)
    original = getattr(type(twin), adapter.attribute).__get__(twin)
    seen: list[torch.dtype] = []
    rope = getattr(twin, "rope", None)
    hook = None
    if isinstance(rope, nn.Module):
        hook = rope.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    try:
        expected = adapter.exercise(original, sample)
    except Exception as e:
        return Traits(), f"running it as {adapter.family} fails: {type(e).__name__}: {e}"
    finally:
        if hook is not None:
            hook.remove()
    dtype = sample.x.dtype
    rotated = seen[0] if seen and seen[0] != dtype else None
    traits, reason = Traits(), None
    for rope in dict.fromkeys((_adopt_rope(twin), None)):  # the module's own where ours rounds in another way
        traits = Traits(rope, rotated)
        replacement = adapter(another(), traits)
        try:
            got = adapter.exercise(replacement, sample)
        except Exception as e:
            return traits, f"its replacement as {adapter.family} fails: {type(e).__name__}: {e}"
        if replacement.tokens is None:
            return traits, f"as {adapter.family} it does not call scaled_dot_product_attention"
        reason = _difference(adapter, got, expected, dtype)
        if reason is None:
            break
    return traits, reason


def _difference(adapter, got: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> str | None:
    # Random tokens of unit size: another order of summation costs some roundings, another computation some 0.1.
    limit = 1e-4 if dtype in (torch.float32, torch.float64) else 64 * torch.finfo(dtype).eps
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape:
            return f"as {adapter.family} it would return {list(a.shape)}, but returns {list(b.shape)}"
        if not bool(torch.isfinite(b).all()):
            continue  # parameters not filled yet, such as VGGT-Omega's bias masks before a checkpoint is loaded
        size = float(b.float().abs().max())
        error = float((a.float() - b.float()).abs().max()) / (size or 1.0)  # of zeros: absolute
        if not error <= limit:
            return f"it has the names of {adapter.family} but computes something else (relative difference {error:.1e})"
    return None


def detached_copy(module: nn.Module, *, share: bool = False) -> nn.Module:
    """A copy in eval mode without hooks or replaced methods, so that what is done with it leaves no trace.

    The module itself is only read, so that it can run in another thread meanwhile. Hooks are left out before the copy
    is made, not after: a hook that is a method of a model would be copied with all of that model.

    Args:
        share: whether the copy has the parameters of the module instead of copies of them.
    """
    memo: dict[int, Any] = {}
    for m in module.modules():
        memo |= {id(m.__dict__[name]): OrderedDict() for name in _HOOKS if name in m.__dict__}
        memo |= {id(value): _LEFT_OUT for value in m.__dict__.values() if isinstance(value, PatchedAttention)}
    if share:
        memo |= {id(p): p for p in module.parameters()}
    twin = copy.deepcopy(module, memo)
    for m in twin.modules():
        for name in [n for n, value in m.__dict__.items() if value is _LEFT_OUT or isinstance(value, PatchedAttention)]:
            del m.__dict__[name]
    return twin.eval()


def _adopt_rope(module: nn.Module) -> RoPE2D | None:
    """A :class:`RoPE2D` that computes what the module's own embedding computes, or None to keep the module's own."""
    rope = getattr(module, "rope", None)
    base = getattr(rope, "base", getattr(rope, "base_frequency", None))
    if not isinstance(base, (int, float)):
        return None
    if isinstance(rope, RoPE2D):
        return rope
    device = place(module)[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn((1, 1, 40, 16), generator=generator, device="cpu").to(device)
    positions = torch.arange(40, device=device)[None, :, None].expand(1, 40, 2).clone()
    exact = RoPE2D(base)
    try:
        if not torch.allclose(rope(tokens.clone(), positions), exact(tokens, positions), atol=1e-4):
            return None
        half = tokens.half()
        theirs = rope(half.clone(), positions).float()
        quantised = RoPE2D(base, exact=False)
        errors = [float((r(half, positions).float() - theirs).abs().max()) for r in (exact, quantised)]
    except Exception:
        # A compiled extension that does not serve this device: its angles are fp32.
        return exact if hasattr(rope, "F0") else None
    return exact if errors[0] <= errors[1] else quantised
