"""The experiment of csrc/cuda/hopper_forward.cu, a forward with wgmma and TMA by hand, against the Triton kernel.

It has not run on a GPU. It would become a backend if it were at least 5 % faster there; it is no part of the package.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import gate4d
from gate4d import MotionGate, TokenLayout, Visibility

from .targets import Setup, Work, check_rows, inputs

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "hopper_forward.cu"
TILE = 128  # queries of a block, and keys
NOTHING = 2**31 - 1


@cache
def library() -> ctypes.CDLL:
    """Compiled with nvcc for sm_90a, once a process."""
    folder = Path(tempfile.mkdtemp(prefix="gate4d-hopper-"))
    flags = "-O3", "-std=c++17", "-arch=sm_90a", "-shared", "-Xcompiler=-fPIC"
    subprocess.run(["nvcc", *flags, str(SOURCE), "-o", str(folder / "hopper.so")], check=True)
    return ctypes.CDLL(str(folder / "hopper.so"))


def attend(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, Nk, D]
    v: Tensor,  # [B, H, Nk, D]
    gate: MotionGate | None = None,
    visible: Visibility | None = None,
    *,
    built: ctypes.CDLL | None = None,
    stream: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``out [B, H, Nq, D]`` and ``lse [B, H, Nq]`` of a renormalised gate of strength 1, on keys or pairs.

    Raises:
        ValueError: what this kernel does not serve.
        RuntimeError: CUDA reports an error.
    """
    (batch, heads, queries, dim), keys = q.shape, k.shape[2]
    g = gate or MotionGate()
    if q.dtype not in (torch.bfloat16, torch.float16) or dim not in (64, 128) or v.shape != k.shape or not keys:
        raise ValueError(
            f"q, k, v must have 16 bits and heads of 64 or 128, got {q.dtype} with {dim} and {v.shape[3]}."
        )
    if g.strength != 1 or not g.renormalize or g.dropped_keys is not None or g.output_scale is not None:
        raise ValueError("gate must have strength 1, be renormalised, drop no keys and scale no output.")
    if not all(describable(x) for x in (q, k, v)):
        raise ValueError("q, k, v must have rows that start at multiples of 16 bytes.")
    bounds = None if visible is None else visible.bounds_on(q.device).int().contiguous()
    reach = None if bounds is None else reach_of(bounds, keys)
    scores = None if g.key_score is None else score_tiles(g.key_score.float())
    query_score = None if scores is None or g.query_score is None else g.query_score.float().contiguous()
    out, lse = torch.empty_like(q), q.new_empty(batch, heads, queries, dtype=torch.float32)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    strides += [0 if x is None or len(x) == 1 else x.stride(0) for x in (bounds, reach)]
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr())
                for x in (q, k, v, query_score, scores, bounds, reach, out, lse)]  # fmt: skip
    if stream is None:
        stream = torch.cuda.current_stream(q.device).cuda_stream
    error = (built or library()).gate4d_hopper_forward(
        int(q.dtype == torch.float16), (ctypes.c_int64 * 5)(batch, heads, queries, keys, dim),
        (ctypes.c_int64 * 14)(*strides), *pointers, ctypes.c_float(dim**-0.5 * 1.4426950408889634),
        ctypes.c_void_p(stream),
    )  # fmt: skip
    if error:
        raise RuntimeError(f"the Hopper kernel was not launched: cudaError {error}.")
    return out, lse


def describable(x: Tensor) -> bool:
    """Whether the copy engine reads it: see ``cuTensorMapEncodeTiled``."""
    return (
        x.data_ptr() % 16 == 0
        and x.stride(3) == 1
        and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:3])
    )


def score_tiles(key_score: Tensor) -> Tensor:
    """``[B, Nk]`` to ``[B, tiles, 132]``: 128 scores, 0 past the end, then their maximum."""
    tiles = F.pad(key_score, (0, -key_score.shape[1] % TILE)).unflatten(1, (-1, TILE))
    return F.pad(torch.cat((tiles, tiles.amax(2, keepdim=True)), 2), (0, 3))


def reach_of(bounds: Tensor, keys: int) -> Tensor:
    """What each tile of queries sees, int32 ``[1 or B, 6, tiles]``: ``reach`` of triton_common.py for all tiles."""
    start, end, sink = bounds.unbind(1)
    end, sink = end.clamp(max=keys), sink.clamp(max=keys)
    some, pad = end > start, -bounds.shape[2] % TILE

    def reduce(x: Tensor, fill: int, largest: bool) -> Tensor:
        tiles = F.pad(x, (0, pad), value=fill).unflatten(1, (-1, TILE))
        return tiles.amax(2) if largest else tiles.amin(2)

    low, high, far = torch.where(some, start, NOTHING), torch.where(some, end, 0), sink
    lowest = reduce(low, NOTHING, False), reduce(high, 0, True), reduce(far, 0, True)
    return torch.stack((*lowest, reduce(start, 0, True), reduce(end, NOTHING, False), reduce(sink, NOTHING, False)), 1)


def _against_triton(s: Setup, tokens: int, dim: int, kind: str, frames: int):
    q, k, v, motion = inputs(Setup(dim=dim, heads=s.heads * s.dim // dim), frames * s.frame if frames else tokens)
    gate = MotionGate.pairwise(motion) if kind == "pairwise" else None
    visible = Visibility.frame_causal(TokenLayout(frames, s.frame, 5)) if frames else None
    ours = {"by hand": partial(attend, q, k, v, gate, visible)}
    triton = partial(gate4d.gated_attention, q, k, v, gate=gate, visible=visible, return_aux=True, backend="triton")

    def check() -> None:
        for step in (*ours.values(), triton):
            check_rows(step()[0], q, k, v, gate, visible)
        (out, lse), (want, aux) = ours["by hand"](), triton()
        if not (out - want).norm() <= 4 * torch.finfo(out.dtype).eps * want.norm():
            raise AssertionError("the output differs from the Triton kernel's")
        if not (lse - aux.lse).abs().max() <= 1e-3:
            raise AssertionError("lse differs from the Triton kernel's")

    return ours, {"triton": triton}, check


def plan(s: Setup) -> list[Work]:
    """On a GPU of compute capability 9.0: by hand and Triton side by side; 0.95 or less makes it a backend."""
    if s.device != "cuda" or (torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)):
        return []
    cases = [(16384, 64, "pairwise", 0), (32768, 64, "none", 0), (16384, 128, "pairwise", 0), (0, 64, "pairwise", 32)]
    return [
        Work(f"G1 by hand {kind} D={d} " + (f"{t} frames" if t else f"N={n}"), 0.95,
             partial(_against_triton, s, n, d, kind, t), 60)
        for n, d, kind, t in cases
    ]  # fmt: skip
