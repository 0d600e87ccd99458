"""Fused norm, RoPE-2D and cache append: the CUDA kernel's arithmetic on the CPU, its compilation, and the torch path.

The kernel has not run on a GPU yet: its functions are compiled for the CPU, with a loop over the lanes of a warp.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.accuracy import assert_accurate, assert_accurate_gradient
from standins import croco, others, vggt
from torch import Tensor
from torch.utils._pytree import tree_leaves

import gate4d
from gate4d.nn import FrameKVCache, RoPE2D, SelfAttention, norm_rope
from gate4d.nn.fused_rope import frequencies_of

ROOT = Path(__file__).parents[2]
INCLUDE = Path(torch.__file__).parent / "include"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BATCH, HEADS, TOKENS = 2, 3, 9
EPS = 1e-5


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    library = tmp_path_factory.mktemp("host") / "norm_rope.so"
    source = ROOT / "tests" / "norm_rope_host.cpp"
    flags = "-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{INCLUDE}"
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def lay_out(x: Tensor, memory: str) -> tuple[Tensor, Tensor]:
    """A view with the values of ``x [B, H, N, D]``, and its buffer, which is NaN elsewhere."""
    b, h, n, d = x.shape
    if memory == "contiguous":
        buffer = torch.full((b, h, n, d), torch.nan, dtype=x.dtype)
        view = buffer
    elif memory == "packed":  # keys in the middle of qkv
        buffer = torch.full((b, n, 3, h, d), torch.nan, dtype=x.dtype)
        view = buffer[:, :, 1].transpose(1, 2)
    elif memory == "cache":  # slots in the middle of a longer cache
        buffer = torch.full((b, h, 2 * n + 5, d), torch.nan, dtype=x.dtype)
        view = buffer[:, :, 5 : 5 + n]
    else:  # no stride is 1
        buffer = torch.full((d, 2 * n, h, b, 2), torch.nan, dtype=x.dtype)
        view = buffer[:, ::2, :, :, 1].permute(3, 2, 1, 0)
    view.copy_(x)
    return view, buffer


def emulate(host, x, out, *, weight=None, bias=None, positions=None, eps=None, grad_out=None, grad_x=None, sums=None):
    """The kernel on the CPU, forward or (with ``grad_out``) backward."""
    views = x, out, grad_out, grad_x
    strides = [s for v in views for s in ((0,) * 4 if v is None else v.stride())]
    at = (0, 0, 0) if positions is None else positions.stride()
    strides += [0 if positions is None or len(positions) == 1 else at[0], *at[1:]]
    frequencies = None if positions is None else frequencies_of(x.shape[3], 100.0, 1.0, x.device)

    def pointer(t: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if t is None else t.data_ptr())

    host.norm_rope(
        TYPES[x.dtype], int(grad_out is not None), 4, (ctypes.c_int64 * 4)(*x.shape), (ctypes.c_int64 * 19)(*strides),
        *(pointer(v) for v in views), pointer(weight), pointer(bias), pointer(positions),
        int(positions is not None and positions.dtype == torch.int64), pointer(frequencies), int(eps is not None),
        ctypes.c_float(eps or 0.0), pointer(sums),
    )  # fmt: skip


CASES = [
    (64, torch.float32, "contiguous", "packed", True, True, torch.int64),
    (64, torch.bfloat16, "packed", "cache", True, True, torch.int32),
    (48, torch.float16, "packed", "cache", True, True, torch.int64),
    (256, torch.float32, "strided", "strided", True, True, torch.int64),
    (4, torch.float32, "strided", "cache", False, True, torch.int32),
    (80, torch.float16, "cache", "strided", True, False, torch.int64),
    (132, torch.bfloat16, "packed", "packed", False, True, torch.int64),
    (64, torch.bfloat16, "packed", "cache", False, False, torch.int64),
]


@pytest.mark.parametrize(("dim", "dtype", "memory", "out_memory", "norm", "rotate", "index"), CASES)
@pytest.mark.parametrize("affine", [True, False])
def test_kernel_arithmetic(host, dim, dtype, memory, out_memory, norm, rotate, index, affine):
    shape = (BATCH, HEADS, TOKENS, dim)
    affine = affine and norm
    x, x_buffer = lay_out((2 * torch.randn(shape) + 0.5).to(dtype), memory)
    grad_out, _ = lay_out(torch.randn(shape).to(dtype), out_memory)
    out, out_buffer = lay_out(torch.full(shape, torch.nan).to(dtype), out_memory)
    grad_x, _ = lay_out(torch.full(shape, torch.nan).to(dtype), memory)
    weight, bias = (torch.rand(dim) + 0.5, torch.randn(dim)) if affine else (None, None)
    positions = torch.randint(-3, 60, (1 if dim == 48 else BATCH, TOKENS, 2)).to(index) if rotate else None
    if rotate:
        positions[:, 0] = -1
    before = x_buffer.clone()
    kernel = {"weight": weight, "positions": positions, "eps": EPS if norm else None}
    emulate(host, x, out, bias=bias, **kernel)
    sums = torch.full((4, 2, dim), torch.nan)
    emulate(host, x, None, grad_out=grad_out, grad_x=grad_x, sums=sums, **kernel)
    assert torch.equal(x_buffer.nan_to_num(7), before.nan_to_num(7))
    assert int(out_buffer.isnan().sum()) == out_buffer.numel() - out.numel()  # nothing written beside the view

    def plain(work: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        leaves = [None if t is None else t.detach().to(work).requires_grad_() for t in (x, weight, bias)]
        rope = {"rope": RoPE2D(), "positions": positions} if rotate else {}
        result = norm_rope(leaves[0], weight=leaves[1], bias=leaves[2], eps=kernel["eps"], **rope)
        used = [t for t in leaves if t is not None]
        return result.detach(), list(torch.autograd.grad(result, used, grad_out.to(work)))

    exact, exact_grads = plain(torch.float64)
    torch_out, torch_grads = plain(dtype)
    assert_accurate("out", out, exact, torch_out)
    got = [grad_x, *sums.sum(0)] if affine else [grad_x]
    for name, g, e, t in zip(("x", "weight", "bias"), got, exact_grads, torch_grads, strict=False):
        assert_accurate_gradient(f"grad of {name}", g, e, t)
    if not norm and not rotate:
        assert torch.equal(out, x)  # values appended to a cache are copied


def test_operator_and_gradients(host, monkeypatch):
    """The path of a CUDA tensor, with the emulation in the kernel's place: arguments, 16-bit parameters, gradients."""

    def forward(x, out, weight, bias, positions, frequencies, norm, eps):
        emulate(host, x, out, weight=weight, bias=bias, positions=positions, eps=eps if norm else None)

    def backward(grad_out, x, weight, positions, frequencies, norm, eps, affine_grads):
        grad_x, sums = torch.empty_like(x), torch.empty(4 if affine_grads else 0, 2, x.shape[3])
        emulate(
            host, x, None, weight=weight, positions=positions, eps=eps if norm else None, grad_out=grad_out,
            grad_x=grad_x, sums=sums if affine_grads else None,
        )  # fmt: skip
        return grad_x, sums

    monkeypatch.setattr("gate4d.nn.fused_rope._fused", lambda x, rope: x.dtype != torch.float64)
    library = torch.library.Library("gate4d", "IMPL")
    library.impl("norm_rope_forward", forward, "CPU")
    library.impl("norm_rope_backward", backward, "CPU")
    positions = torch.randint(-3, 60, (1, TOKENS, 2))
    inputs = [torch.randn(BATCH, HEADS, TOKENS, 32), torch.rand(32) + 0.5, torch.randn(32)]
    inputs = [t.bfloat16() for t in inputs]
    grad_out = torch.randn(BATCH, HEADS, TOKENS, 32)

    def run(dtype: torch.dtype, fused: bool = True) -> tuple[Tensor, ...]:
        x, weight, bias = (t.to(dtype, copy=True).requires_grad_() for t in inputs)
        options = {"weight": weight, "bias": bias, "eps": EPS}
        if fused:
            out = norm_rope(x, rope=RoPE2D(), positions=positions, **options)
        else:
            out = RoPE2D()(torch.nn.functional.layer_norm(x, (32,), weight, bias, EPS), positions)
        return out.detach(), *torch.autograd.grad(out, (x, weight, bias), grad_out.to(dtype))

    try:
        results = run(torch.bfloat16), run(torch.float64), run(torch.bfloat16, fused=False)
        with torch.no_grad():
            slots = torch.empty_like(inputs[0])
            norm_rope(
                inputs[0], weight=inputs[1], bias=inputs[2], eps=EPS, rope=RoPE2D(), positions=positions, out=slots
            )
    finally:
        library._destroy()
    assert torch.equal(slots, results[0][0])
    for name, got, exact, plain in zip(("out", "x", "weight", "bias"), *results, strict=True):
        assert got.dtype == torch.bfloat16
        assert_accurate(name, got, exact, plain)


@pytest.fixture
def emulated(host, monkeypatch):
    """Tensors on the CPU take the path of CUDA tensors, with the emulation in the kernel's place; yields its calls."""
    calls = []

    def forward(x, out, weight, bias, positions, frequencies, norm, eps):
        calls.append(out)
        emulate(host, x, out, weight=weight, bias=bias, positions=positions, eps=eps if norm else None)

    monkeypatch.setattr("gate4d.nn.fused_rope._fused", lambda x, rope: x.dtype != torch.float64)
    library = torch.library.Library("gate4d", "IMPL")
    library.impl("norm_rope_forward", forward, "CPU")
    yield calls
    library._destroy()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("sizes", [[TOKENS] * 5, [TOKENS, 4, 4, TOKENS, 5, TOKENS, 4]], ids=["even", "ragged"])
def test_attention_module_uses_the_kernel(norm, rotate, sizes, emulated, monkeypatch):
    """One call each for q and k, the latter into the cache's own memory; the same outputs as the torch path."""
    module = SelfAttention(32, 2, qk_norm=norm, rope=RoPE2D() if rotate else None)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    frames = [torch.randn(2, n, 32) for n in sizes]
    pos = torch.randint(0, 20, (2, TOKENS, 2))
    inside = []  # of each call: the frame's memory, whether the kernel wrote there

    def run(fused: bool):
        cache = FrameKVCache(window=2, anchors=1, ragged=len(set(sizes)) > 1, page_frames=2)
        attend = cache.attend

        def attended(q, **call):
            inside.append(any(lies_in(c, page[0]) for c in emulated[-1:] for page in cache._pages.tensors))
            return attend(q, **call)

        monkeypatch.setattr(cache, "attend", attended)
        with monkeypatch.context() as m:
            if not fused:
                m.setattr("gate4d.nn.fused_rope._fused", lambda x, rope: False)
            with torch.no_grad():
                outs = [module(x, pos[:, : x.shape[1]], cache=cache) for x in frames]
                plain = module(frames[0], pos)
        return [*outs, plain], cache

    want, other = run(fused=False)
    assert not emulated
    got, cache = run(fused=True)
    assert len(emulated) == 2 * len(frames) + 2
    assert inside == [False] * len(frames) + [True] * len(frames)
    assert cache.frame_ids == other.frame_ids
    for (k, v), (other_k, other_v) in zip(cache.pages(), other.pages(), strict=True):
        torch.testing.assert_close(k, other_k, rtol=1e-5, atol=1e-5)
        assert torch.equal(v, other_v)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def lies_in(x: Tensor, memory: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


def views(m) -> list[dict[str, Tensor]]:
    return [{"img": torch.rand(1, 3, 32, 48, dtype=next(m.parameters()).dtype)} for _ in range(2)]


def clip(m, frames: int = 2) -> Tensor:
    return torch.rand(1, frames, 3, 28, 42, dtype=next(m.parameters()).dtype)


PATCHED = {
    "dust3r": (croco.Dust3r, lambda m: m(*views(m))),
    "cut3r": (croco.Cut3r, lambda m: m(views(m))),
    "vggt": (vggt.Vggt, lambda m: m(clip(m))),
    "vggt4d": (vggt.Vggt4d, lambda m: m(clip(m))),
    "pi3": (others.Pi3, lambda m: m(clip(m))),
    "streamvggt": (vggt.StreamVggt, lambda m: m.inference(list(clip(m, 4).transpose(0, 1)))),
    "stream3r": (vggt.Stream3r, lambda m: [*map(vggt.Session(m, "causal").forward_stream, clip(m, 4).transpose(0, 1))]),
}
# Two a self-attention with norm or RoPE and a cross-attention with RoPE.
CALLS = {"dust3r": 24, "cut3r": 32, "vggt": 8, "vggt4d": 8, "pi3": 12, "streamvggt": 32, "stream3r": 32}


def run_patched(name, emulated, monkeypatch, *, dtype=torch.float32, autocast=False, observed=False):
    """What the patched stand-in gives with the kernel and without, and the number of calls of the kernel."""
    build, call = PATCHED[name]
    model = build().eval().to(dtype)
    results = []
    for fused in (False, True):
        emulated.clear()
        with monkeypatch.context() as m, torch.no_grad(), gate4d.patch(model) as handle:
            if not fused:
                m.setattr("gate4d.nn.fused_rope._fused", lambda x, rope: False)
            for row in handle.table.rows if observed else ():
                getattr(row.module, row.adapter.attribute).observers.append(lambda q, k, scale: None)
            emulated.clear()  # the trial runs'
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results.append([x for x in tree_leaves(call(model)) if isinstance(x, Tensor)])
    return *results, len(emulated)


@pytest.mark.parametrize("name", PATCHED)
def test_patched_models_use_the_kernel(name, emulated, monkeypatch):
    """The same outputs; a stream's keys go straight into its caches, one for each of 2 layers."""
    slots, claim = [], FrameKVCache.claim
    monkeypatch.setattr(FrameKVCache, "claim", lambda c, k, v: slots.append(claim(c, k, v)) or slots[-1])
    want, got, calls = run_patched(name, emulated, monkeypatch)
    assert calls == CALLS[name]
    written, slots = {x.data_ptr() for x in emulated}, slots[-8:]  # the trial runs' come first
    assert len(slots) == (8 if name.startswith("stream") else 0)
    assert all(s.k.data_ptr() in written for s in slots)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "context", "serves"),
    [
        ("vggt", {"dtype": torch.bfloat16}, False),  # its RoPE rounds the angles
        ("cut3r", {"dtype": torch.bfloat16}, True),  # its decoders rotate in fp32
        ("vggt", {"autocast": True}, True),  # LayerNorm returns fp32
        ("vggt4d", {"autocast": True}, False),  # which it hands out
        ("pi3", {"autocast": True}, False),  # cast back before RoPE
        ("vggt", {"autocast": True, "observed": True}, False),
        ("vggt", {"observed": True}, True),
    ],
)
def test_where_rounding_would_differ_the_kernel_is_not_used(name, context, serves, emulated, monkeypatch):
    want, got, calls = run_patched(name, emulated, monkeypatch, **context)
    assert (calls > 0) is serves
    for a, b in zip(got, want, strict=True):
        if serves:
            assert (a - b).norm() <= 4 * torch.finfo(torch.bfloat16).eps * b.norm()
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_32_bits(host, axis):
    """Items, heads or tokens more than 2**31 elements apart; of 4 GiB only the pages that are touched exist."""
    shape, strides = [1, 1, 1, 16], [0, 0, 0, 1]
    shape[axis], strides[axis] = 2, 2**31 + 16
    try:
        x, out = (torch.empty(2**31 + 64, dtype=torch.float16).as_strided(shape, strides) for _ in range(2))
    except RuntimeError as e:
        pytest.skip(f"no address space: {e}")
    near_x, near = torch.randn(shape).half(), torch.empty(shape, dtype=torch.float16)
    x.copy_(near_x)
    weight, positions = torch.rand(16), torch.randint(0, 9, (shape[0], shape[2], 2))
    for source, to in ((x, out), (near_x, near)):
        emulate(host, source, to, weight=weight, positions=positions, eps=EPS)
    assert near.isfinite().all()
    assert torch.equal(out, near)


def test_the_torch_path_writes_into_a_cache():
    x, _ = lay_out(torch.randn(BATCH, HEADS, TOKENS, 16), "packed")
    out, buffer = lay_out(torch.zeros(x.shape), "cache")
    positions = torch.randint(-3, 60, (1, TOKENS, 2))
    with torch.no_grad():
        assert norm_rope(x, eps=EPS, rope=RoPE2D(), positions=positions, out=out) is out
    expected = RoPE2D()(torch.nn.functional.layer_norm(x, (16,), eps=EPS), positions)
    assert torch.equal(out, expected)
    assert int(buffer.isnan().sum()) == buffer.numel() - out.numel()


def test_bad_arguments():
    x, positions = torch.randn(1, 2, 5, 8), torch.zeros(1, 5, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"x must be floating point of shape \[B, H, N, D\], got .*\[2, 5, 8\]"):
        norm_rope(x[0])
    with pytest.raises(ValueError, match="weight belongs to the LayerNorm"):
        norm_rope(x, weight=torch.ones(8))
    with pytest.raises(ValueError, match=r"bias must have shape \[8\], got \[4\]"):
        norm_rope(x, bias=torch.ones(4), eps=EPS)
    with pytest.raises(ValueError, match="together"):
        norm_rope(x, rope=RoPE2D())
    with pytest.raises(ValueError, match=r"integers of shape \[1, 5, 2\], got torch.float32"):
        norm_rope(x, rope=RoPE2D(), positions=positions.float())
    with pytest.raises(ValueError, match=r"out must be torch.float32 \[1, 2, 5, 8\] on cpu, got torch.float16"):
        norm_rope(x, eps=EPS, out=x.half())
    with pytest.raises(NotImplementedError, match="out has no gradient"):
        norm_rope(x.requires_grad_(), eps=EPS, out=torch.empty(1, 2, 5, 8))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_compiles_without_spills(architecture, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    source = ROOT / "csrc" / "cuda" / "norm_rope.cu"
    flags = "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas=-v", "-DTORCH_TARGET_VERSION=0x020a000000000000"
    command = ["nvcc", *flags, f"-I{INCLUDE}", "-c", str(source), "-o", str(tmp_path / "x.o")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    kernels = [line.strip() for line in report.splitlines() if "stack frame" in line]
    assert kernels == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"] * 6, (
        report
    )  # 2 passes, 3 types
