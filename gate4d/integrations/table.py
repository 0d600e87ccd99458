"""``inspect``: the attention modules of a model, what they are and how they were recognised."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from .attends import attends
from .base import CROSS_PARTS, PATCHING, SELF_PARTS, PatchedAttention, Traits, examine, method_parameters
from .croco import CrocoCross, CrocoSelf, Easi3rCross, Easi3rMaps, Easi3rSelf
from .cut3r import MaskedTtt3rCross, Ttt3rCross, Ttt3rSelf
from .generic import FastVggtSelf, GenericSelf, InterceptedSelf
from .maps import ReturnsMaps
from .more import MoreDino, MoreSelf, MoreSparse
from .readers import MapReaders
from .stream import Stream3rMask, Stream3rSelf, StreamVggtGlobal, StreamVggtSelf
from .vggt import DinoSelf, OmegaSelf, Pi3Self, Vggt4dSelf, VggtDinoSelf, VggtSelf

# The first that fits and passes its exercise serves the module; exact conventions come before generic ones.
ADAPTERS: tuple[type[PatchedAttention], ...] = (
    CrocoSelf, CrocoCross, Easi3rSelf, Easi3rCross, Ttt3rSelf, Ttt3rCross, MaskedTtt3rCross, StreamVggtSelf,
    Stream3rSelf, OmegaSelf, Vggt4dSelf, MoreSelf, MoreSparse, MoreDino, Pi3Self, VggtSelf, VggtDinoSelf, DinoSelf,
    FastVggtSelf, InterceptedSelf, GenericSelf,
)  # fmt: skip
# Methods of a model (not of an attention module) that read what attention returns or build its masks.
PARTS = (Easi3rMaps, Stream3rMask, StreamVggtGlobal)

# Roles by the names that the families share; the first match wins.
_ROLES = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"camera_head|camera_decoder", "camera head"),
        (r"dec_blocks_state", "state"),
        (r"pose_retriever", "memory"),
        (r"inter_frame_blocks|global_blocks", "global"),
        (r"frame_blocks", "frame"),
        (r"enc_blocks|encoder|patch_embed", "encoder"),
        (r"_decoder|_head|final_transform", "head"),
        (r"dec_blocks|decoder", "decoder"),
    )
)


@dataclass(frozen=True)
class AttentionRow:
    """One attention module.

    Attributes:
        name: dotted name in the model.
        module: the module.
        family: call convention it follows (``croco``, ``ttt3r``, ``vggt``, ...).
        role: ``encoder``, ``frame``, ``global``, ``decoder self``, ``decoder cross``, ``state self``, ``state cross``,
            ``camera head``, ``memory ...``, ``head`` or ``attention``.
        kind: ``self`` or ``cross``.
        layer: index of its block, -1 where the name has none.
        heads, head_dim: of the attention.
        how: how it was recognised.
    """

    name: str
    module: nn.Module
    family: str
    role: str
    kind: str
    layer: int
    heads: int
    head_dim: int
    how: str
    adapter: type[PatchedAttention] = field(repr=False)
    traits: Traits = field(repr=False)

    @property
    def control(self) -> PatchedAttention | None:
        """Where gate, visibility and observers are set; None while the model is not patched."""
        found = self.module.__dict__.get(self.adapter.attribute)
        return found if isinstance(found, PatchedAttention) else None

    @property
    def tokens(self) -> tuple[int, int] | None:
        """``(Nq, Nk)`` of the last call; None while not patched or not run."""
        return None if self.control is None else self.control.tokens


@dataclass(frozen=True)
class AttentionTable:
    """What :func:`inspect` found.

    Attributes:
        rows: the attention modules that are patched.
        parts: parts of the model that belong to them.
        problems: reasons against patching.
        ignored: torch's own attention modules, which stay as they are.
        unpatched: names of modules that attend in a way that is not known, and stay as they are, each with a reason.
        reader: who decides what is returned for attention maps; None on models that ask for none.
    """

    rows: tuple[AttentionRow, ...]
    parts: tuple[Any, ...]
    problems: tuple[str, ...]
    ignored: tuple[str, ...]
    unpatched: tuple[str, ...] = ()
    reader: MapReaders | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[AttentionRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def families(self) -> tuple[str, ...]:
        """Families found, in order of appearance."""
        return tuple(dict.fromkeys(r.family for r in self.rows))

    @property
    def uncalled(self) -> list[AttentionRow]:
        """Rows that were never called although the patched model ran: gates and observers there do nothing."""
        ran = any(row.tokens is not None for row in self.rows)
        return [row for row in self.rows if ran and row.control is not None and row.tokens is None]

    @property
    def notes(self) -> list[str]:
        """What the patch costs or does not reach on this model, a line each."""
        notes = [f"never called so far, a gate there does nothing: {row.name}" for row in self.uncalled]
        if self.reader is not None and self.reader.reason is not None:
            notes.append(
                "attention maps are given whole, as upstream does, because "
                f"{self.reader.reason}: each that is read costs B x H x Nq x Nk numbers and the time to compute them"
            )
        return notes

    def select(self, role: str | None = None, kind: str | None = None) -> list[AttentionRow]:
        """Rows of a role (or its first word: ``"state"``) and kind."""
        return [
            r for r in self.rows if (role is None or role in (r.role, r.role.split()[0])) and kind in (None, r.kind)
        ]

    def __str__(self) -> str:
        head = ("name", "family", "role", "heads x dim", "tokens", "recognised by")
        lines = [head]
        for row in self.rows:
            tokens = "-" if row.tokens is None else " x ".join(map(str, row.tokens))
            lines.append((row.name, row.family, row.role, f"{row.heads} x {row.head_dim}", tokens, row.how))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        text += self.notes
        text += [f"left alone: {name}" for name in (*self.ignored, *self.unpatched)]
        text += [f"problem: {problem}" for problem in self.problems]
        return "\n".join(text)


def inspect(model: nn.Module) -> AttentionTable:
    """Finds the attention modules of a model by structure: child modules, shapes and parameter names of their methods.

    Each distinct module is also run beside its replacement on a few random tokens (a detached copy; the model is not
    touched), so a row says that the replacement computes the same. The import path does not matter. Modules that attend
    under other names are found by their code, and listed with the reason why they stay as they are.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    with PATCHING:
        return _inspect(model)


def _inspect(model: nn.Module) -> AttentionTable:
    rows, problems, ignored, unpatched, known = [], [], [], [], {}
    recurrent = any(".dec_blocks_state." in f".{name}." for name, _ in model.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            problem = "DataParallel on several devices: every replica would call the attention of the first"
            problems.append(f"{name or '(the model itself)'}: {problem}")
        if isinstance(module, nn.MultiheadAttention):
            ignored.append(f"{name} (torch.nn.MultiheadAttention)")
        if not (_has(module, SELF_PARTS) or _has(module, CROSS_PARTS)):
            if (why := attends(module)) is not None:
                unpatched.append(f"{name or '(the model itself)'} ({type(module).__name__}): {why}")
            continue
        problem = _shape_problem(module) or _foreign(module)
        if problem is None:
            key = _signature(module)
            if key not in known:
                known[key] = _recognise(module)
            adapter, traits, problem = known[key]
        if problem is not None:
            problems.append(f"{name or '(the model itself)'} ({type(module).__name__}): {problem}")
            continue
        family = "cut3r" if recurrent and adapter.family == "croco" else adapter.family
        rows.append(_row(name, module, family, adapter, traits))
    parts = _parts(model, {r.adapter.family for r in rows}, problems)
    reader = _reader(model, [r for r in rows if issubclass(r.adapter, ReturnsMaps)])
    return AttentionTable(tuple(rows), tuple(parts), tuple(problems), tuple(ignored), tuple(unpatched), reader)


def _has(module: nn.Module, parts: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, p, None), nn.Module) for p in parts)


def _shape_problem(module: nn.Module) -> str | None:
    heads = getattr(module, "num_heads", None)
    if not isinstance(heads, int) or heads < 1:
        return f"it has no num_heads, got {heads!r}"
    if _has(module, SELF_PARTS):
        dim, packed = (getattr(module.qkv, n, None) for n in ("in_features", "out_features"))
        if dim is None or packed != 3 * dim or dim % heads:
            return f"qkv must project C to 3 C features with C a multiple of {heads} heads, got {dim} to {packed}"
    else:
        shapes = {n: (getattr(module, n).in_features, getattr(module, n).out_features) for n in CROSS_PARTS}
        if len({s for pair in shapes.values() for s in pair}) != 1 or shapes["projq"][0] % heads:
            return f"projq, projk, projv and proj must all project C to C features, got {shapes}"
    dropout = getattr(getattr(module, "attn_drop", None), "p", 0.0)
    return f"attention dropout is not supported, got attn_drop.p={dropout}" if dropout else None


def _foreign(module: nn.Module) -> str | None:
    """Methods replaced on the instance by somebody else: patching over them would lose or bypass what they do."""
    for attribute in {a.attribute for a in ADAPTERS}:
        found = module.__dict__.get(attribute)
        if found is not None and not isinstance(found, PatchedAttention):
            who = getattr(found, "__qualname__", type(found).__qualname__)
            return f"its {attribute} was already replaced by {getattr(found, '__module__', '?')}.{who}"
    return None


def _signature(module: nn.Module) -> tuple:
    """Modules that agree in this are exercised once."""
    shapes = tuple((n, tuple(p.shape), p.dtype, str(p.device)) for n, p in module.named_parameters())
    children = tuple((n, type(m), repr(m)) for n, m in module.named_children())  # sizes where there are no parameters
    flags = tuple(sorted((n, v) for n, v in vars(module).items() if isinstance(v, (bool, int, float, str))))
    return type(module), shapes, children, flags, id(getattr(module, "rope", None))


def _recognise(module: nn.Module) -> tuple[type[PatchedAttention] | None, Traits, str | None]:
    reasons = []
    for adapter in ADAPTERS:
        if adapter.fits(module):
            traits, reason = examine(adapter, module)
            if reason is None:
                return adapter, traits, None
            reasons.append(reason)
    got = ", ".join(method_parameters(module, "forward") or ())
    return None, Traits(), "; ".join(reasons) or f"unknown call convention forward({got})"


def require_family(method: str, rows: Iterable[AttentionRow], *families: str) -> None:
    """ValueError unless there are rows, all of one of the families."""
    found = sorted({row.family for row in rows})
    if len(found) != 1 or found[0] not in families:
        raise ValueError(f"method {method!r} needs a model of the family {' or '.join(families)}, found {found}.")


def require_parts(method: str, owner: nn.Module, names: Iterable[str]) -> None:
    """ValueError unless the model has the attributes that the method drives."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise ValueError(f"method {method!r} drives {type(owner).__name__} through {missing}, which it lacks.")


def _row(name: str, module: nn.Module, family: str, adapter: type[PatchedAttention], traits: Traits) -> AttentionRow:
    role = next((role for pattern, role in _ROLES if pattern.search(name)), "attention")
    alternating = re.search(r"(?:^|\.)decoder\.(\d+)\.attn$", name)
    if alternating:  # Pi3: even blocks see one frame, odd blocks all
        role = "global" if int(alternating[1]) % 2 else "frame"
    elif role in ("decoder", "state", "memory"):
        role = f"{role} {adapter.kind}"
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    heads = module.num_heads
    dim = (module.qkv if adapter.kind == "self" else module.projq).in_features
    how = f"{'/'.join(SELF_PARTS if adapter.kind == 'self' else CROSS_PARTS)}, {adapter.attribute}"
    how += f"({', '.join(method_parameters(module, adapter.attribute) or ())})"
    if traits.rotate_dtype is not None:
        how += f", RoPE in {str(traits.rotate_dtype).removeprefix('torch.')}"
    layer = int(numbers[-1]) if numbers else -1
    return AttentionRow(name, module, family, role, adapter.kind, layer, heads, dim // heads, how, adapter, traits)


def _reader(model: nn.Module, rows: list[AttentionRow]) -> MapReaders | None:
    """Who reads the maps of these rows: the loops of the smallest module that has all of them."""
    if not rows:
        return None
    paths = [row.name.split(".")[:-1] for row in rows]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    prefix = ".".join(parts[0] for parts in same)
    names = {row.name.removeprefix(f"{prefix}."): row for row in rows}
    replacements = {name: partial(row.adapter, traits=row.traits) for name, row in names.items()}
    return MapReaders(model.get_submodule(prefix), replacements)


def _parts(model: nn.Module, families: set[str], problems: list[str]) -> list[Any]:
    found = []
    for part in PARTS:
        if not families & set(part.families):
            continue
        owners = [m for m in model.modules() if method_parameters(m, part.attribute) == part.parameters]
        if part.required and not owners:
            problems.append(f"{part.families[0]}: no module has {part.attribute}({', '.join(part.parameters)})")
        for owner in owners:
            current = owner.__dict__.get(part.attribute)
            if current is not None and not isinstance(current, PARTS):
                problems.append(f"{part.attribute} of {type(owner).__name__} was already replaced by somebody else")
                continue
            try:
                reason = part.differs(owner)
            except Exception as e:
                reason = f"{type(e).__name__}: {e}"
            if reason is None:
                found.append((owner, part))
            elif part.required:
                problems.append(f"{part.attribute} of {type(owner).__name__} is not upstream's: {reason}")
    return found
