"""Cross moments of both forms, compiled and not, against a float64 materialised computation."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gate4d import cross_moments
from gate4d.kernels import support
from gate4d.kernels._library import kernel_error
from gate4d.statistics import cross as module

COMPILED = kernel_error("cross_moments") is None
compiled = pytest.mark.skipif(not COMPILED, reason="the compiled library is missing")


@pytest.fixture
def torch_only(monkeypatch):
    """As where the library is missing."""
    monkeypatch.setattr(support, "kernel_error", lambda operator: "absent")


def features(*shape, seed=0, offset=0.0, layers=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) + offset for _ in range(layers)]


def materialised(xs, ys, scale=1.0):
    """Mean and variance over j of the mean of every map, formed one by one."""
    maps = []
    for x, y in zip(xs, ys, strict=True):
        for frame in y.double().unbind(1) if y.dim() == 5 else [y.double()]:
            maps.append(scale * x.double() @ frame.mT)  # [B, H, Nx, Ny]
    z = torch.stack(maps).mean((0, 2))
    return z.mean(-1), z.var(-1)


def check(moments, expected, relative=1e-5):
    mean, variance = expected
    assert torch.isfinite(moments.m2).all()
    # Means cross zero; what cancels there is measured on the scale of the largest.
    assert (moments.mean - mean).abs().max() <= relative * mean.abs().max()
    assert ((moments.variance() - variance).abs() <= relative * variance).all()


@pytest.mark.parametrize("method", ["stream", "covariance", "auto"])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize(
    ("x_shape", "y_shape", "layers"),
    [
        ((1, 16, 1036, 64), (1, 2, 16, 1036, 64), 2),  # VGGT4D's V_deep, two source frames
        ((1, 12, 576, 64), (1, 12, 576, 64), 1),
        ((1, 16, 768, 48), (1, 16, 577, 48), 1),
        ((2, 3, 5, 4), (2, 3, 7, 4), 3),
    ],
)
def test_against_materialised(x_shape, y_shape, layers, offset, method):
    xs, ys = features(*x_shape, layers=layers), features(*y_shape, seed=1, layers=layers, offset=offset)
    check(cross_moments(xs, ys, scale=0.3, method=method), materialised(xs, ys, 0.3))


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_without_the_library(offset, torch_only):
    xs, ys = features(2, 3, 70, 20, layers=2), features(2, 2, 3, 130, 20, seed=1, layers=2, offset=offset)
    check(cross_moments(xs, ys, method="stream"), materialised(xs, ys))


def test_many_tiles(monkeypatch, torch_only):
    monkeypatch.setattr(module, "_TILE", (7, 11))
    (x,), (y,) = features(2, 2, 50, 8), features(2, 2, 40, 8, seed=1)
    check(cross_moments(x, y, method="stream"), materialised([x], [y]))


# Rows around the panels of every instruction set and over several tasks, columns around the tile of 64, features
# around a vector and the chunk of 256.
SIZES = [
    (1, 2, 1),
    (2, 65, 3),
    (47, 64, 16),
    (49, 63, 17),
    (96, 129, 255),
    (130, 70, 257),
    (500, 200, 512),
    (3, 5, 3000),
]


@compiled
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(("rows", "columns", "dim"), SIZES)
def test_compiled_sizes(rows, columns, dim, offset):
    generator = torch.Generator().manual_seed(rows)
    x, y = (torch.randn(2, n, dim, generator=generator) for n in (rows, columns))
    y += offset
    centre = y.mean(1)
    mean, m2 = torch.ops.gate4d.cross_moments([x[:, None]], y, centre)
    z = x.double() @ y.double().mT
    exact = z.var(-1, unbiased=False) * columns
    assert torch.isfinite(m2).all()
    assert ((m2 - exact).abs() <= 1e-5 * exact).all(), ((m2 - exact).abs() / exact).max()
    assert (mean - z.mean(-1)).abs().max() <= 1e-5 * z.mean(-1).abs().max()


@compiled
def test_compiled_parts_and_layouts():
    """Layers of several widths, heads inside tokens, strided and reversed views, a last stride other than 1."""
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(2, 60, 3, 4, 8, generator=generator)
    parts = [
        qkv[:, :, 0].transpose(1, 2),
        torch.randn(2, 120, 2, 5, generator=generator).transpose(1, 2)[:, :, ::2],
        torch.randn(2, 3, 7, 60, generator=generator).mT,
        torch.randn(1, 1, 60, 300, generator=generator).expand(2, -1, -1, -1),
    ]
    dense = torch.cat([p.transpose(1, 2).flatten(2) for p in parts], dim=-1)
    wide = torch.randn(2, 90, 2 * dense.shape[2], generator=generator)
    for y in (wide[:, :, : dense.shape[2]], wide[:, :, ::2]):
        centre = y.mean(1)
        torch.library.opcheck(torch.ops.gate4d.cross_moments.default, (parts, y, centre))
        mean, m2 = torch.ops.gate4d.cross_moments(parts, y, centre)
        z = dense.double() @ y.double().mT
        torch.testing.assert_close(mean.double(), z.mean(-1), rtol=1e-5, atol=1e-5 * z.mean(-1).abs().max().item())
        torch.testing.assert_close(m2.double(), z.var(-1, unbiased=False) * 90, rtol=1e-5, atol=0)


@compiled
def test_compiled_refusals():
    x, y = torch.randn(1, 2, 5, 4), torch.randn(1, 6, 8)
    op = torch.ops.gate4d.cross_moments
    for parts, columns, centre, message in (
        ([], y, y[:, 0], "at least one part"),
        ([x.double()], y, y[:, 0], r"x\[0\] must be float32 .*, got float64"),
        (
            [x, x[:, :, :4]],
            y,
            y[:, 0],
            r"each part of x must be float32 \[1, any, 5, any\].*, got float32 \[1, 2, 4, 4\]",
        ),
        ([x[..., :3]], y, y[:, 0], r"y must be float32 \[1, any, 6\].*, got float32 \[1, 6, 8\]"),
        ([x], y[:, :0], y[:, 0], "y must have at least one row"),
        ([x], y, y[:, 0, :3], "centre"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(parts, columns, centre)


@compiled
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_compiled_with_fewer_instructions(isa):
    if isa.startswith("avx512") and not torch.ops.gate4d.cpu_isa().startswith("avx512"):
        pytest.skip(f"this process already runs the {torch.ops.gate4d.cpu_isa()} kernels")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        __file__,
        "-k",
        "compiled and not fewer",
    ]
    environment = os.environ | {"GATE4D_CPU_ISA": isa}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout.strip().splitlines()[-1]


def test_inputs_are_left_alone_and_may_be_views():
    (qkv,) = features(1, 30, 3, 2, 16)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    before = qkv.clone()
    check(cross_moments(q, k), materialised([q], [k]))
    assert torch.equal(qkv, before)
    single = torch.randn(1, 1, 9, 4)
    before = single.clone()
    cross_moments(single, single)
    assert torch.equal(single, before)


def test_auto_takes_the_cheaper_form(monkeypatch):
    wide = []
    to_double = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda x: wide.append(1) or to_double(x))
    for library, crossover in ((None, 640), ("absent", 256)):  # 2 c F at F = 64
        monkeypatch.setattr(support, "kernel_error", lambda operator, library=library: library)
        if library is None and not COMPILED:
            continue
        for tokens in (crossover - 16, crossover + 16):
            wide.clear()
            (x,) = features(1, 1, tokens, 64)
            module.feature_moments([x], x[0].clone())
            assert bool(wide) == (tokens > crossover)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), cut=st.integers(1, 19))
def test_algebra(seed, cut):
    (x,), (y,) = features(2, 2, 6, 4, seed=seed), features(2, 3, 2, 20, 4, seed=seed + 1)
    whole = cross_moments(x, y)
    parts = [cross_moments(x, y[..., s, :]) for s in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(parts[0].merge(parts[1]).m2, whole.m2, rtol=1e-4, atol=1e-5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(cross_moments(x, y[..., order, :]).m2, whole.m2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cross_moments(x, y + 5.0).m2, whole.m2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cross_moments(x[:1], y[:1]).m2, whole.m2[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["auto", "stream", "covariance"])
def test_products_without_features_are_0(method, poisoned_memory):
    moments = cross_moments(torch.randn(2, 2, 3, 0), torch.randn(2, 2, 5, 0), method=method)
    assert torch.equal(moments.mean, torch.zeros(2, 3))
    assert torch.equal(moments.m2, torch.zeros(2, 3))


def test_bad_arguments_are_named():
    (x,), (y,) = features(1, 2, 5, 4), features(1, 2, 6, 4)
    with pytest.raises(ValueError, match="method"):
        cross_moments(x, y, method="fast")
    with pytest.raises(ValueError, match="as many layers"):
        cross_moments([x, x], [y])
    with pytest.raises(ValueError, match="y must have x's B, H, D"):
        cross_moments(x, y[..., :3])
    with pytest.raises(ValueError, match="x must be"):
        cross_moments(x[0], y)
    with pytest.raises(ValueError, match="layers must agree"):
        cross_moments([x, x[:, :, :4]], [y, y])
    with pytest.raises(TypeError, match="x must be a floating tensor"):
        cross_moments([], [])
    assert (cross_moments(x, y[:, :, :0]).count == 0).all()
