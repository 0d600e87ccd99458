"""Fused norm, RoPE-2D and cache append: the reference, the torch path, who computes it, and the CUDA C++ kernel.

That kernel has not run on a GPU yet: its functions are compiled for the CPU, with a loop over the lanes of a warp.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.accuracy import assert_accurate, assert_accurate_gradient
from helpers.norm_rope_cases import BATCH, CASES, EPS, HEADS, TOKENS, draw, evaluate, lay_out
from standins import croco, others, vggt
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

import gate4d
from gate4d.kernels.norm_rope import op
from gate4d.kernels.norm_rope import reference as norm_rope_reference
from gate4d.nn import FrameKVCache, RoPE2D, SelfAttention, norm_rope

ROOT = Path(__file__).parents[2]
INCLUDE = Path(torch.__file__).parent / "include"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    library = tmp_path_factory.mktemp("host") / "norm_rope.so"
    source = ROOT / "tests" / "helpers" / "norm_rope_host.cpp"
    flags = "-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{INCLUDE}"
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def emulate(host, x, out, *, weight=None, bias=None, positions=None, eps=None, grad_out=None, grad_x=None, sums=None):
    """The kernel on the CPU, forward or (with ``grad_out``) backward."""
    weight, bias = (None if t is None else t.float().contiguous() for t in (weight, bias))
    views = x, out, grad_out, grad_x
    strides = [s for v in views for s in ((0,) * 4 if v is None else v.stride())]
    at = (0, 0, 0) if positions is None else positions.stride()
    strides += [0 if positions is None or len(positions) == 1 else at[0], *at[1:]]
    frequencies = None if positions is None else op.frequencies(x.shape[3], 100.0, 1.0, x.device)

    def pointer(t: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if t is None else t.data_ptr())

    host.norm_rope(
        TYPES[x.dtype], int(grad_out is not None), 4, (ctypes.c_int64 * 4)(*x.shape), (ctypes.c_int64 * 19)(*strides),
        *(pointer(v) for v in views), pointer(weight), pointer(bias), pointer(positions),
        int(positions is not None and positions.dtype == torch.int64), pointer(frequencies), int(eps is not None),
        ctypes.c_float(eps or 0.0), pointer(sums),
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_kernel_arithmetic(host, case, affine):
    x = draw(case, affine)
    grad_x, _ = lay_out(torch.full(x.x.shape, torch.nan).to(case.dtype), case.memory)
    before, rows = x.x_buffer.clone(), x.out_buffer.numel() - x.out.numel()
    kernel = {"weight": x.weight, "positions": x.settings.get("positions"), "eps": x.settings["eps"]}
    emulate(host, x.x, x.out, bias=x.bias, **kernel)
    sums = torch.full((4, 2, case.dim), torch.nan)
    emulate(host, x.x, None, grad_out=x.grad_out, grad_x=grad_x, sums=sums, **kernel)
    assert torch.equal(x.x_buffer.nan_to_num(7), before.nan_to_num(7))
    assert int(x.out_buffer.isnan().sum()) == rows  # nothing written beside the view
    (exact, *exact_grads), (torch_out, *torch_grads) = (evaluate(norm_rope, x, d) for d in (torch.float64, None))
    assert_accurate("out", x.out, exact, torch_out)
    got = [grad_x, *sums.sum(0)] if x.weight is not None else [grad_x]
    for name, g, e, t in zip(("x", "weight", "bias"), got, exact_grads, torch_grads, strict=False):
        assert_accurate_gradient(f"grad of {name}", g, e, t)
    if not case.norm and not case.rotate:
        assert torch.equal(x.out, x.x)  # values appended to a cache are copied


def reference(x, *, weight=None, bias=None, eps=None, rope=None, positions=None):
    """The reference with the arguments of the public function."""
    frequencies = None if rope is None else op.frequencies(x.shape[3], rope.base, rope.scale, x.device)
    return norm_rope_reference.norm_rope(
        x, weight, bias, positions, frequencies, eps is not None, 0.0 if eps is None else eps
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_torchs_layer_norm_and_rope(case):
    """In float64, values and gradients; its frequencies are rounded to fp32, as the kernels' are."""
    x = draw(case, True)
    for name, a, b in zip(
        ("out", "x", "weight", "bias"),
        evaluate(reference, x, torch.float64),
        evaluate(norm_rope, x, torch.float64),
        strict=False,
    ):
        assert (a - b).abs().max() <= 60 * torch.finfo(torch.float32).eps * b.abs().max(), name


def test_the_reference_by_hand():
    """A quarter turn for y at position 1, half a turn back for x at -2; deviations -3 to 3 over sqrt(5 + 4)."""
    quarter_turn = torch.tensor([torch.pi / 2], dtype=torch.float64)
    x = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64).reshape(1, 1, 1, 4)
    turned = norm_rope_reference.norm_rope(x, None, None, torch.tensor([[[1, -2]]]), quarter_turn, False, 0.0)
    assert turned.flatten().tolist() == pytest.approx([-3.0, 1.0, -5.0, -7.0])
    weight, bias = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    normed = norm_rope_reference.norm_rope(x, weight, bias, None, None, True, 4.0)
    assert normed.flatten().tolist() == pytest.approx([-1.0, -2 / 3, 1.0, 5.0])


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
        return grad_x, sums.sum(0) if affine_grads else sums[:, 0]

    monkeypatch.setattr("gate4d.kernels.norm_rope.op.fits", lambda x, exact: x.dtype != torch.float64)
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

    monkeypatch.setattr("gate4d.kernels.norm_rope.op.fits", lambda x, exact: x.dtype != torch.float64)
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
                m.setattr("gate4d.kernels.norm_rope.op.fits", lambda x, exact: False)
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
                m.setattr("gate4d.kernels.norm_rope.op.fits", lambda x, exact: False)
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
    """With the flags torch's own build gives, which switch the implicit conversions of 16-bit types off."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    source = ROOT / "csrc" / "cuda" / "norm_rope.cu"
    assert "-D__CUDA_NO_HALF_CONVERSIONS__" in COMMON_NVCC_FLAGS
    flags = "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas=-v", "-DTORCH_TARGET_VERSION=0x020a000000000000"
    command = ["nvcc", *COMMON_NVCC_FLAGS, *flags, f"-I{INCLUDE}", "-c", str(source), "-o", str(tmp_path / "x.o")]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = [line.strip() for line in result.stderr.splitlines() if "stack frame" in line]
    # 2 passes, 3 types
    assert kernels == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"] * 6, result.stderr


def test_backends_by_name():
    x = torch.randn(1, 2, 5, 8)
    assert torch.equal(norm_rope(x, eps=EPS, backend="torch"), norm_rope(x, eps=EPS))
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of \['triton', 'cuda', 'torch'\], got 'sdpa'"):
        norm_rope(x, eps=EPS, backend="sdpa")
    with pytest.raises(NotImplementedError, match=r"'triton' cannot serve this call: it needs CUDA tensors, got cpu"):
        norm_rope(x, eps=EPS, backend="triton")
    with pytest.raises(NotImplementedError, match=r"multiples of 4 up to 256, got 6; .*CUDA C\+\+ kernel is not inst"):
        norm_rope(x[..., :6], eps=EPS, backend="cuda")
    rounding = RoPE2D(exact=False)
    assert any("rounds them" in r for r in op.triton_reasons(x, rounding.exact))


def test_the_peer_is_taken_by_name_alone(monkeypatch):
    """The CUDA C++ operators get fp32 parameters and give partial sums; auto never calls them."""
    monkeypatch.setattr(op, "cuda_reasons", lambda x, exact: [])
    library, calls = torch.library.Library("gate4d", "IMPL"), []

    def forward(x, out, weight, bias, positions, frequencies, norm, eps):
        calls.append("forward")
        assert weight.dtype == bias.dtype == torch.float32
        out.copy_(norm_rope_reference.norm_rope(x, weight, bias, positions, frequencies, norm, eps))

    def backward(grad_out, x, weight, positions, frequencies, norm, eps, affine_grads):
        calls.append("backward")
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, weight, torch.zeros_like(weight))]
            out = norm_rope_reference.norm_rope(*leaves, positions, frequencies, norm, eps)
        grad_x, *sums = torch.autograd.grad(out, leaves, grad_out)
        return grad_x, torch.stack((torch.stack(sums) / 4, torch.stack(sums) * 3 / 4))

    library.impl("norm_rope_forward_cuda", forward, "CPU")
    library.impl("norm_rope_backward_cuda", backward, "CPU")
    x, weight, bias = torch.randn(2, 3, 5, 16), (torch.rand(16) + 0.5).bfloat16(), torch.randn(16).bfloat16()
    results = []
    try:
        for backend in ("auto", "cuda"):
            leaves = [t.clone().requires_grad_() for t in (x, weight.float(), bias.float())]
            cast = [t.bfloat16() if backend == "cuda" else t for t in leaves[1:]]
            settings = {"rope": RoPE2D(), "positions": torch.arange(10).reshape(1, 5, 2), "eps": EPS}
            out = norm_rope(leaves[0], weight=cast[0], bias=cast[1], **settings, backend=backend)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
            assert calls == ([] if backend == "auto" else ["forward", "backward"])
    finally:
        library._destroy()
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 2**-7 * a.abs().max()


@pytest.mark.parametrize("create", ["inference", "fake"])
def test_frequencies_kept_by_one_call_serve_every_other(create):
    """Made in inference mode they would be refused by autograd, made under fake tensors they would hold nothing."""
    settings = 32, 77.0, 1.0, torch.device("cpu")
    op._frequencies.pop(settings, None)
    with torch.inference_mode() if create == "inference" else FakeTensorMode():
        made = op.frequencies(*settings)
    assert isinstance(made, FakeTensor) == (create == "fake")
    kept = op.frequencies(*settings)
    assert not isinstance(kept, FakeTensor)
    assert not kept.is_inference()
    assert kept.tolist() == pytest.approx([77.0 ** (-i / 8) for i in range(8)])
    assert op.frequencies(*settings) is kept


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_in_one_graph(grad, emulated):
    """``fullgraph``: choosing the kernel must not break the graph."""
    torch._dynamo.reset()
    module = SelfAttention(32, 2, qk_norm=True, rope=RoPE2D())
    x, pos = torch.randn(2, TOKENS, 32), torch.randint(0, 20, (2, TOKENS, 2))
    with torch.set_grad_enabled(grad):
        want = module(x, pos)
        assert len(emulated) == 2
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        got = compiled(x, pos)
    assert len(emulated) > 2
    torch.testing.assert_close(got, want)


def test_under_torch_func_the_torch_path_serves():
    x, reasons = torch.randn(3, 1, 2, 5, 8), []

    def call(t: Tensor) -> Tensor:
        reasons.extend(op.triton_reasons(t, True))
        return norm_rope(t, eps=EPS)

    out = torch.vmap(call)(x)
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x, (8,), eps=EPS))
    assert "it has no rule for torch.func transforms" in reasons
    assert not any("torch.func" in r for r in op.triton_reasons(x[0], True))
