"""FlexAttention as a backend: blocks from intervals, its arithmetic, the real compiled kernel on the CPU."""

from __future__ import annotations

import pytest
import torch
from helpers.accuracy import assert_accurate
from helpers.attention_cases import VISIBLE
from helpers.torch_attention import torch_attention

import gate4d
from gate4d import MotionGate, TokenLayout, Visibility
from gate4d.kernels.attention import backends, flex
from gate4d.kernels.attention.op import Request


def request_(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, dim: int = 64, **options) -> Request:
    return Request(device, dtype, dim, dim, **{"gate": "pairwise", **options})


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (request_("mps"), "needs CUDA, XPU or CPU tensors, got mps"),
        (request_(dtype=torch.float64), "supports float32, bfloat16 and float16, got float64"),
        (request_(dim=8), "head dimensions from 16 on, got 8"),
        (request_(aux=True, row_stats=True), "no row statistics"),
        (request_(learned=True), "no gradient to the gate's scores"),
        (request_("cpu", aux=True), "on the CPU it returns no lse"),
        (request_("cpu", renormalize=False), "on the CPU it returns no lse"),
        (request_("cpu", grad=True), "on the CPU it has no backward"),
    ],
)
def test_it_says_why_not(request_: Request, reason: str) -> None:
    assert any(reason in r for r in flex.reasons(request_))


def test_it_serves_what_the_triton_kernel_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "_selected", {})
    wide = Request("cuda", torch.bfloat16, 320, 64, gate="pairwise", masked=True, aux=True)
    assert backends.select("auto", wide).name == "flex"
    assert backends.select("auto", request_(masked=True, aux=True)).name == "triton"


@pytest.mark.parametrize("tokens", [5, 127, 128, 129, 400, 640])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("visible", VISIBLE)
def test_blocks_are_those_of_the_dense_mask(visible: str, dropped: bool, tokens: int) -> None:
    """Full ones are full, what is left out is empty, and no block is partial that could be full."""
    batch, v = 2, VISIBLE[visible](tokens, tokens, 2)
    bounds = None if v is None else v.bounds
    queries = tokens if v is None else bounds.shape[2]
    drop = torch.rand(batch, tokens) < 0.3 if dropped else None
    if dropped:
        drop[0, :260], drop[1, 128:256] = True, False
    mask = (Visibility.full() if v is None else v).dense(queries, tokens)
    mask = mask if drop is None else mask & ~drop[:, None]
    padded = torch.nn.functional.pad(mask, (0, -tokens % 128, 0, -queries % 128))
    cells = padded.unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
    seen, full = cells.any(4).any(2), cells.all(4).all(2)
    got = flex.blocks(bounds, drop, queries, tokens, torch.device("cpu"))
    assert not (got.partial & got.full).any()
    assert torch.equal(got.full.expand_as(full), full)
    assert not (seen & ~(got.partial | got.full)).any()
    if visible not in (
        "intervals",
        "intervals_without_sinks",
        "empty",
        "overlapping_sinks",
        "packed",
        "window",
        "ragged",
    ):
        assert dropped or torch.equal((got.partial | got.full).expand_as(seen), seen)


def test_a_list_of_blocks_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    blocks = flex.blocks
    monkeypatch.setattr(flex, "blocks", lambda *args: made.append(1) or blocks(*args))
    monkeypatch.setattr(flex, "compiled", lambda c: flex._template)
    q = torch.randn(1, 1, 60, 16)
    visible = Visibility.frame_causal(TokenLayout(3, 20))
    call = backends.Call(q, q, q, None, None, None, visible.bounds, 0.25, 1.0, True, False)
    first = flex.run(call)[0]
    assert torch.equal(flex.run(call)[0], first)
    assert len(made) == 1
    visible.bounds[:, 1] = 60  # written in place: made anew
    assert not torch.equal(flex.run(call)[0], first)
    assert len(made) == 2


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("visible", ["full", "window", "empty", "intervals"])
@pytest.mark.parametrize(("kind", "strength"), [("none", 1.0), ("pairwise", 1.0), ("pairwise", 1.7), ("pairwise", 0.0),
                                                ("keys", 2.0), ("drop", 1.0), ("drop+pairwise", 1.7)])  # fmt: skip
def test_its_arithmetic(kind: str, strength: float, visible: str, renormalize: bool, monkeypatch) -> None:
    """Uncompiled in float64, with lse, against the reference: weights of 0, rows of which none is left, empty rows."""
    monkeypatch.setattr(flex, "compiled", lambda c: flex._template)
    monkeypatch.setitem(backends.BACKENDS, "flex", backends.Backend("flex", lambda r: [], _with_lse))
    monkeypatch.setattr(backends, "_selected", {})
    v_ = VISIBLE[visible](40, 40, 2)
    queries = 40 if v_ is None else v_.bounds.shape[2]
    q = torch.randn(2, 3, queries, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, 40, 16, dtype=torch.float64).unbind(0)
    query, key = torch.rand(2, queries, dtype=torch.float64), torch.rand(2, 40, dtype=torch.float64)
    key[:, ::4] = 1
    query[:, 5] = 1
    drop = torch.rand(2, 40) < 0.3
    key[1] = 1
    query[1, 7] = 1
    scored = kind not in ("none", "drop")
    gate = MotionGate(
        query if "pairwise" in kind else None, key if scored else None,
        dropped_keys=drop if "drop" in kind else None, strength=strength, renormalize=renormalize,
    )  # fmt: skip
    (out, aux), (want, other) = (
        gate4d.gated_attention(q, k, v, gate=gate, visible=v_, return_aux=True, backend=b)
        for b in ("flex", "reference")
    )
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(aux.lse.double(), other.lse.double(), rtol=1e-6, atol=1e-6)


def _with_lse(c):
    """As on a GPU: what is left out on the CPU is compiled code alone."""
    gated = c.key_score is not None and c.strength != 0
    out, own = flex._attend(c, gated, True)
    return (out, own, None) if c.renormalize or not gated else flex.unnormalised(c, out, own)


@pytest.mark.parametrize("kind", ["pairwise", "drop+keys"])
def test_the_compiled_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, by Inductor's C++, on every visibility; one compilation serves all of one size."""
    compilations = torch._dynamo.utils.counters["stats"]
    tokens, batch = 415, 2
    layout = TokenLayout(5, 83)
    rows = torch.arange(tokens)
    visibilities = [
        Visibility.frame_causal(layout), Visibility.frame_causal(layout, window=2, sinks=1),
        Visibility.per_frame(layout),
        Visibility.packed([0, 100, 100, 300, tokens]),
        Visibility.intervals(torch.where(rows % 97 == 5, 200, tokens), torch.where(rows % 97 == 5, tokens, 0)),
    ]  # fmt: skip
    before = None
    for visible in visibilities:
        q, k, v = torch.randn(3, batch, 2, tokens, 32).unbind(0)
        query, key = torch.rand(2, batch, tokens).unbind(0)
        key[:, ::5], query[:, 3], key[1], query[1, 7] = 1, 1, 1, 1
        gate = MotionGate(
            query if kind == "pairwise" else None, key, dropped_keys=torch.rand(batch, tokens) < 0.4
            if "drop" in kind else None,
        )  # fmt: skip
        with torch.no_grad():
            out = gate4d.gated_attention(q, k, v, gate=gate, visible=visible, backend="flex")
            exact = gate4d.gated_attention(
                *(x.double() for x in (q, k, v)), gate=gate, visible=visible, backend="reference"
            )
            plain, _ = torch_attention(q, k, v, gate=gate, visible=visible)
        assert_accurate("out", out, exact, plain)
        before = compilations["unique_graphs"] if before is None else before
    assert compilations["unique_graphs"] == before


def test_more_shapes_than_the_limit_of_recompilations_never_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of Dynamo that counts the runs of its graphs stands in for Inductor, which takes seconds a shape."""
    runs = []

    def counter(graph: torch.fx.GraphModule, inputs: list):
        return lambda *args: runs.append(1) or graph(*args)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=counter, **options))
    monkeypatch.setattr(flex, "_compiled", type(flex._compiled)())
    limit = torch._dynamo.config.recompile_limit
    sizes = range(20, 20 + limit + 4)
    for n in sizes:
        q = torch.randn(1, 1, n, 16)
        with torch.no_grad():
            out = gate4d.gated_attention(q, q, q, gate=MotionGate.keys(torch.zeros(1, n)), backend="flex")
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))
        assert runs, n  # a compiled graph
        runs.clear()

    def refuses(shape_class):
        def call(*args):
            raise torch._dynamo.exc.FailOnRecompileLimitHit("recompile_limit reached")

        return call

    monkeypatch.setattr(flex, "compiled", refuses)
    with pytest.raises(RuntimeError, match=r"compiled anew too often.*recompile_limit, or name another backend"):
        gate4d.gated_attention(q, q, q, backend="flex")


def test_where_there_is_no_dynamic_code_every_size_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InductorError

    asked = []

    def compiled(shape_class):
        def call(*args):
            asked.append(shape_class.sizes)
            if shape_class.sizes is None:
                raise InductorError(RuntimeError("unbacked_bindings"), None)
            return args[0], None

        return call

    monkeypatch.setattr(flex, "compiled", compiled)
    monkeypatch.setattr(flex, "_static_only", set())
    one = flex.ShapeClass(
        torch.device("cuda", 0), torch.float16, (64, 64), "", False, False, False, True, False, 0.125, 1.0, None
    )
    for sizes in ((1, 1, 5, 5), (1, 1, 6, 6)):
        flex._call(one, sizes, (torch.zeros(1),))
    assert asked == [None, (1, 1, 5, 5), (1, 1, 6, 6)]
