"""Whether a model's loops read more of its attention maps than their means: found out by running them.

TTT3R's loops ask for all logits of the state's attention and take their mean over keys, which has a closed form. Forks
of it kept every name and read other things: entropies, maxima, single tokens.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .base import PATCHING, PatchedAttention, detached_copy, place
from .maps import ReturnsMaps, whole_map

_FRAMES = 3  # the first is not gated, the gate of the second shows in the third
_TRIALS = 12  # at most, of one model
_PLAIN = (bool, int, float, str, type(None))
_STATE = 12  # tokens of state and of pose memory
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_KNOWN = (  # what loops and steps are called with
    "views", "view", "device", "i", "feat_i", "pos_i", "shape_i", "state_feat", "state_pos", "init_state_feat", "mem",
    "init_mem",
)  # fmt: skip
_NOISE = 4.0  # beside logits of about one: whatever is read of single entries changes well above rounding


class MapReaders:
    """What the loops of one model read of its maps, and so what its attention modules return for them.

    The loops are the methods that roll out over views. Copies of the model's structure, with its own parameters, run
    each of them on a few small random views: one is given maps that are noise around the means, the other nothing but
    the means. If the queries of every attention, the outputs and what is kept in the modules agree, means
    are enough.

    What is read may depend on settings, such as TTT3R's ``config.model_update_type``: once a frame they are compared,
    and after a change the loops are tried again.

    Args:
        owner: the module that has the loops and all of the attention.
        attention: the modules that return maps by their names in the owner, and how each is replaced.

    Attributes:
        reason: None if means are enough, else why not.
    """

    def __init__(self, owner: nn.Module, attention: Mapping[str, Callable[[nn.Module], PatchedAttention]]):
        self.owner = owner
        self.attention = dict(attention)
        self.loops = _loops(type(owner))
        self.reason: str | None = None
        self._settings: list | None = None
        self._state: set[str] = set()  # attributes that the loops themselves change: no settings
        self._trials = 0
        self._asked: set[int] = set()
        self.check()

    def __deepcopy__(self, memo: dict) -> MapReaders | None:
        owner = memo.get(id(self.owner))
        if owner is None:  # a part is copied without the loops: they are not known there
            return None
        twin = memo[id(self)] = copy.copy(self)
        twin.owner = owner
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_settings": None, "_asked": set()}  # tried again where it is loaded

    def map_of(self, attention: ReturnsMaps, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """The map of ``attention``, or its mean where means are enough."""
        if not torch.compiler.is_compiling():
            if not self._asked or id(attention) in self._asked:  # a new frame
                self.check()
            self._asked.add(id(attention))
        enough = self.reason is None and mask is None
        return attention.mean(q, k) if enough else attention.whole(q, k, mask)

    def check(self) -> None:
        """Try the loops, unless nothing that may decide on what they read has changed since the last time."""
        self._asked.clear()
        if self._settings != self._current():
            self._trials += 1
            if self._trials > _TRIALS:  # whole maps are right whatever is read
                self.reason, self._settings = "settings of the model change again and again", None
                return
            with PATCHING:
                self.reason = self._trial()
            self._settings = self._current()

    def _current(self) -> list | None:
        """Plain values in the model and in its configuration, and its loops: what may decide on what is read."""
        if self._trials > _TRIALS:
            return None
        config = vars(self.owner).get("config", {})
        config = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
        own = {n: v for n, v in vars(self.owner).items() if n not in self._state}
        values = [(n, v) for source in (own, config) for n, v in source.items() if isinstance(v, _PLAIN)]
        return values + [getattr(getattr(self.owner, name), "__func__", None) for name in self.loops]

    def _trial(self) -> str | None:
        if not self.loops:
            return f"{type(self.owner).__name__} has no loop over views: what reads them is not known"
        if any(p.is_meta for p in self.owner.parameters()):
            return "the parameters are on the meta device: no loop can be tried"
        device, dtype = place(self.owner)
        limit = 2e-5 if dtype in (torch.float32, torch.float64) else 4 * torch.finfo(dtype).eps
        cuda = [device] if device.type == "cuda" else []
        failed = None
        with torch.random.fork_rng(cuda), torch.no_grad(), torch.autocast(device.type, enabled=False):
            for name in self.loops:
                try:
                    noisy = self._run(name, _Probe(noisy=True))
                except Exception as e:
                    failed = failed or f"{name} could not be tried: {type(e).__name__}: {e}"
                    continue
                try:
                    enough = not noisy.asked or _same(self._run(name, _Probe(noisy=False)).seen, noisy.seen, limit)
                except Exception:  # with maps of one column something does not fit
                    enough = False
                if not enough:
                    return f"{name} reads more of them than their mean over keys"
        return failed

    def _run(self, name: str, probe: _Probe) -> _Probe:
        twin = detached_copy(self.owner, share=True)
        _lighten(twin, self.attention)
        for path, replace in self.attention.items():
            module = twin.get_submodule(path)
            control = replace(module)
            control.reader = probe
            control.observers.append(probe.observe)
            module.__dict__[control.attribute] = control
        torch.default_generator.manual_seed(0)
        before = dict(vars(twin))
        try:
            result = getattr(twin, name)(**_arguments(twin, name))
        finally:
            after = vars(twin)
            self._state |= {n for n in before.keys() | after.keys() if before.get(n, probe) is not after.get(n, probe)}
        kept = [[v for n, v in vars(m).items() if n not in ("_modules", "_parameters")] for m in twin.modules()]
        probe.seen += [x for x in tree_leaves((result, kept)) if isinstance(x, (Tensor, np.ndarray, float))]
        return probe


class _Probe:
    """In place of a :class:`MapReaders` while loops are tried: gives noisy maps or means, and sees the queries."""

    def __init__(self, noisy: bool):
        self.noisy = noisy
        self.asked = 0
        self.seen: list[Any] = []

    def observe(self, q: Tensor, k: Tensor, scale: float) -> None:
        self.seen.append(q)

    def map_of(self, attention: ReturnsMaps, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        self.asked += 1
        if mask is not None:
            return whole_map(q, k, attention.scale, mask)
        mean = attention.mean(q, k)
        if not self.noisy:
            return mean
        generator = torch.Generator().manual_seed(self.asked)
        noise = torch.randn((*q.shape[:3], k.shape[2]), generator=generator, device="cpu")
        # Made of the very mean that the other run is given: they differ by the rounding of the noise alone.
        return mean + _NOISE * (noise - noise.mean(-1, keepdim=True)).to(mean.device, mean.dtype)


def _lighten(model: nn.Module, kept: Collection[str]) -> None:
    """Takes out of a copy what costs time and has no part in how maps are read; ``kept`` names what gives them."""
    blocks = getattr(model, "enc_blocks", None)
    if isinstance(blocks, nn.ModuleList) and not any(name.startswith("enc_blocks.") for name in kept):
        model.enc_blocks = blocks[:1]
    for module in list(model.modules()):
        if isinstance(getattr(module, "mlp", None), nn.Module):
            module.mlp = nn.Identity()
    if isinstance(getattr(model, "state_size", None), int):
        model.state_size = min(model.state_size, _STATE)
    memory = getattr(model, "pose_retriever", None)
    if isinstance(getattr(memory, "mem", None), nn.Parameter):
        memory.mem = nn.Parameter(memory.mem[:, :_STATE].detach(), requires_grad=False)
    if hasattr(model, "_downstream_head"):
        model.__dict__["_downstream_head"] = lambda *args, **kwargs: {}


def _loops(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the methods that call the rollout which returns the maps; without one, of those that take views.

    A private step whose arguments are not known stands for the methods that call it.
    """
    functions: dict[str, Any] = {}
    for base in itertools.takewhile(lambda c: c is not nn.Module, cls.__mro__):
        functions = {n: f for n, f in vars(base).items() if inspect.isfunction(f)} | functions
    if "_recurrent_rollout" not in functions:
        return tuple(n for n, f in functions.items() if {"view", "views"} & set(inspect.signature(f).parameters))
    found: list[str] = []
    todo = ["_recurrent_rollout"]
    for name in todo:
        callers = [n for n, f in functions.items() if name in f.__code__.co_names and n not in todo]
        step = name.startswith("_") and not set(_required(functions[name])) <= {*_KNOWN, "self"}
        if step and callers:
            todo += callers
        else:
            found.append(name)
    return tuple(found)


def _required(function: Any) -> list[str]:
    """What a loop has to be called with; the device always, because upstream's default is another one."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.name == "device" or (p.default is p.empty and p.kind not in _STARRED)]


def _arguments(model: nn.Module, name: str) -> dict[str, Any]:
    """What a loop is called with: small random views, and what CUT3R's steps take beside them."""
    required = _required(getattr(model, name))
    if missing := [n for n in required if n not in _KNOWN]:
        raise TypeError(f"it takes {', '.join(missing)}, unknown here")
    device, dtype = place(model)
    views = [_view(model, number, device, dtype) for number in range(_FRAMES)]
    known: dict[str, Any] = {"views": views, "device": device, "i": 1}
    known["view"] = {**views[1], "ray_mask": ~views[1]["ray_mask"], "ray_map": torch.zeros_like(views[1]["ray_map"])}
    if not set(required) <= known.keys():
        shape, feat, pos = model._encode_views(views)
        state, state_pos = model._init_state(feat[-1][0], pos[0])
        mem = model.pose_retriever.mem.expand(len(state), -1, -1)
        known |= {"feat_i": feat[-1][1], "pos_i": pos[1], "shape_i": shape[1], "state_feat": state, "mem": mem}
        known |= {"state_pos": state_pos, "init_state_feat": state.clone(), "init_mem": mem.clone()}
    return {n: known[n] for n in required}


def _view(model: nn.Module, number: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    embedding = next((m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3), None)
    side = 16 if embedding is None else embedding.stride[0]
    height, width = 4 * side, 6 * side
    image = torch.rand((1, 3, height, width), generator=torch.Generator().manual_seed(number), device="cpu")
    yes = torch.ones(1, dtype=torch.bool, device=device)
    return {
        "img": (2 * image - 1).to(device, dtype), "true_shape": torch.tensor([[height, width]], device=device),
        "ray_map": torch.full((1, height, width, 6), torch.nan, device=device, dtype=dtype), "idx": number,
        "camera_pose": torch.eye(4, device=device)[None], "instance": str(number), "img_mask": yes, "ray_mask": ~yes,
        "update": yes, "reset": ~yes,
    }  # fmt: skip


def _same(got: list[Any], expected: list[Any], limit: float) -> bool:
    if len(got) != len(expected):
        return False
    for pair in zip(got, expected, strict=True):
        a, b = (torch.as_tensor(x) for x in pair)
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        a, b = a.double().nan_to_num(), b.double().nan_to_num()
        size = float(b.abs().max()) if b.numel() > 1 else 1.0  # one number, such as a mean, may cancel to nothing
        if a.numel() and not float((a - b).abs().max()) <= limit * size:
            return False
    return True
