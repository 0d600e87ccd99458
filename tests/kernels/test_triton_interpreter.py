"""The Triton kernels run by Triton's interpreter, values and gradients against the float64 reference.

fp32, fp16 and bf16, whose products and rounding ``helpers.interpreter`` mends. Without TRITON_INTERPRET the kernels are
compiled when they are imported, so the cases run in a process of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="pip install gate4d[triton]")

from helpers.interpreted import INSIDE, run_interpreted

if not INSIDE:

    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    import triton
    import triton.language as tl
    from helpers.accuracy import assert_accurate
    from helpers.attention_cases import GATES, Case, _caller, check, draw, evaluate
    from helpers.interpreter import checked_addresses, sequential_products
    from triton.runtime.errors import InterpreterError

    from gate4d import MotionGate, TokenLayout, Visibility
    from gate4d.kernels._triton.configurations import PASSES, Config, override
    from gate4d.kernels._triton.primitives import power_code
    from gate4d.kernels.attention import backends, triton_launch
    from gate4d.kernels.attention import op as ops
    from gate4d.kernels.attention.reference import attention as attention_reference
    from gate4d.kernels.cross_moments import triton as cross_triton
    from gate4d.kernels.received_attention import triton as received_triton
    from gate4d.kernels.received_attention.reference import received_attention as received_reference

    sequential_products()
    checked_addresses()

    BF16, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
    SMALL = {"batch": 1, "queries": 50, "keys": 47}
    SAME = {"batch": 2, "heads": 1, "queries": 65, "keys": 65}
    CASES = [
        Case("none", "full", SINGLE, dim=64, **SMALL),
        Case("pairwise", "full", HALF, dim=48, **SAME),
        Case("pairwise", "window", SINGLE, dim=72, **SMALL),
        Case("pairwise", "intervals", HALF, memory="qkv", **SAME),
        Case("pairwise_0", "full", SINGLE, **SMALL),
        Case("pairwise_half", "frame_causal", SINGLE, **SMALL),
        Case("pairwise_half", "intervals", HALF, **SMALL),
        Case("pairwise_2", "per_frame", HALF, **SMALL),
        Case("pairwise_2", "full", SINGLE, **SMALL),
        Case("pairwise_3", "full", SINGLE, **SAME),
        Case("pairwise_3", "full", SINGLE, **SMALL),
        Case("pairwise_3", "packed", HALF, **SMALL),
        Case("pairwise_1.7", "ragged", SINGLE, **SMALL),
        Case("pairwise_1.7", "full", HALF, **SMALL),
        Case("queries", "full", HALF, **SMALL),
        Case("queries", "window", SINGLE, **SMALL),
        Case("keys", "empty", SINGLE, **SMALL),
        Case("keys", "intervals_without_sinks", HALF, dim=16, value_dim=24, **SMALL),
        Case("keys", "packed", SINGLE, memory="heads_last", **SMALL),
        Case("drop_keys", "window", SINGLE, memory="heads_last", **SAME),
        Case("drop_keys", "full", HALF, dim=80, **SMALL),
        Case("static_to_dynamic", "overlapping_sinks", SINGLE, **SMALL),
        Case("static_to_dynamic", "full", HALF, **SMALL),
        Case("static_to_dynamic_renormalized", "frame_causal", HALF, **SMALL),
        Case("zeroed_after_softmax", "intervals", SINGLE, memory="odd_rows", **SMALL),
        Case("dropped_and_gated", "intervals", HALF, **SAME),
        Case("general", "window", SINGLE, memory="last_stride_2", **SAME),
        Case("general", "packed", HALF, **SMALL),
        Case("keys", "full", HALF, memory="expanded", **SMALL),
        Case("pairwise", "full", SINGLE, batch=1, heads=1, queries=1, keys=1, dim=1),
        Case("pairwise", "full", HALF, batch=1, queries=1, keys=63, dim=256, value_dim=40),
        Case("pairwise", "full", HALF, logit_scale=8.0, **SMALL),
        Case("none", "full", SINGLE, logit_scale=30.0, **SMALL),
        Case("pairwise", "full", SINGLE, logit_scale=30.0, **SAME),
        Case("keys", "full", SINGLE, logit_scale=40.0, dim=64, **SAME),
        Case("pairwise_1.7", "window", SINGLE, logit_scale=30.0, **SMALL),
        Case("none", "window", BF16, **SMALL),
        Case("pairwise", "intervals", BF16, dim=48, **SAME),
        Case("keys", "full", BF16, logit_scale=8.0, **SMALL),
        Case("pairwise_1.7", "full", BF16, **SMALL),
        Case("dropped_and_gated", "packed", BF16, memory="qkv", **SAME),
    ]

    @pytest.fixture(autouse=True)
    def _triton() -> Iterator[None]:
        """The launchers take the place of the CPU kernels; tiles are small, so that a case has many."""
        library = torch.library.Library("gate4d", "IMPL")
        library.impl("attention_forward", triton_launch.forward, "CPU", allow_override=True)
        library.impl("attention_backward", triton_launch.backward, "CPU", allow_override=True)
        before = dict(backends.BACKENDS)
        backends.BACKENDS["triton"] = backends.Backend("triton", lambda r: [], lambda c: ops.attention(*c))
        backends._selected.clear()
        with ExitStack() as stack:
            for kind in PASSES:
                stack.enter_context(override(kind, Config(32, 16, 4, 1)))
            yield
        backends.BACKENDS.update(before)
        backends._selected.clear()
        library._destroy()

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy computes what tl.where then discards
    @pytest.mark.filterwarnings("ignore:.*verrid.*")
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_attention(case: Case, poisoned_memory: None) -> None:
        check(case, "triton")

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.filterwarnings("ignore:.*verrid.*")
    @pytest.mark.parametrize("place", ["k", "v"])
    @pytest.mark.parametrize("gate", ["none", "pairwise", "keys", "pairwise_1.7", "general", "dropped_and_gated"])
    def test_what_no_query_sees_does_not_matter(gate: str, place: str) -> None:
        """Padding at the end and a gap behind the sinks, inside tiles that are read."""
        rows = torch.arange(60)
        visible = Visibility.intervals(torch.where(rows < 32, 20, 40), torch.where(rows < 32, 37, 55), 5)
        x = replace(draw(Case(gate, "full", SINGLE, 1, 1, 60, 60, 16)), visible=visible)
        results = []
        for value in (0.0, float("nan"), float("inf"), 3e38):
            dirty = getattr(x, place).clone()
            dirty[:, :, 55:] = value
            dirty[:, :, 5:20] = value
            results.append(evaluate(_caller("triton"), replace(x, **{place: dirty}), gate))
        clean = results[0]
        for other in results[1:]:
            for was, now in zip(clean, other, strict=True):
                assert all(was[n] is None or torch.equal(was[n], now[n]) for n in was)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.filterwarnings("ignore:.*verrid.*")
    @pytest.mark.parametrize("place", ["q", "k", "v"])
    def test_a_nan_reaches_who_sees_it(place: str) -> None:
        """The last of three frames, which fill tiles of queries: itself, and nothing of the frames before."""
        visible = Visibility.frame_causal(TokenLayout(3, 32))
        x = replace(draw(Case("none", "full", SINGLE, 1, 2, 96, 96, 16)), visible=visible)
        dirty = getattr(x, place).clone()
        dirty[:, :, 64:] = torch.nan
        clean = evaluate(_caller("triton"), x, "none")
        values, grads = evaluate(_caller("triton"), replace(x, **{place: dirty}), "none")
        for name in ("out", "lse", "entropy", "max_prob", "sum_sq"):
            assert torch.equal(values[name][:, :, :64], clean[0][name][:, :, :64])
            assert place == "v" or values[name][:, :, 64:].isnan().all()
        assert values["out"][:, :, 64:].isnan().all()
        assert torch.equal(grads["q"][:, :, :64], clean[1]["q"][:, :, :64])
        assert grads["k"].isnan().any(-1).all()  # the last frame sees every key
        assert grads["q"][:, :, 64:].isnan().any(-1).all()

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_weights_below_every_number() -> None:
        """Strengths that make every weight of a row 0, or its square, in fp16 and fp32."""
        q = torch.randn(1, 1, 5, 16)
        k, v = torch.zeros(1, 1, 3, 16), torch.randn(1, 1, 3, 16)
        key = torch.full((1, 3), 1 - 2.0**-24)
        for dtype in (SINGLE, HALF):
            for strength in (1.0, 1.5, 2.0, 3.0, 4.0, 50.0):
                x = [t.to(dtype) for t in (q, k, v)]
                for a in (None, torch.ones(1, 5)):
                    out, lse, stats = triton_launch.forward(*x, a, key, None, None, 0.25, strength, True, True)
                    assert_close = torch.testing.assert_close
                    tolerance = 1e-5 if dtype == SINGLE else 2e-3
                    assert_close(
                        out.float(), x[2].float().mean(2, keepdim=True).expand_as(out), rtol=tolerance, atol=tolerance
                    )
                    assert_close(stats[2], torch.full_like(lse, 1 / 3), rtol=1e-4, atol=0)
                    args = (a, key, None, None, 0.25, strength, True)
                    grads = triton_launch.backward(torch.ones_like(out), None, *x, out, lse, *args, True)
                    assert all(g.isfinite().all() for g in grads)
                    assert_close(grads[2].float(), torch.full_like(grads[2].float(), 5 / 3), rtol=2 * tolerance, atol=0)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
    @pytest.mark.parametrize("above", [10.0, 30.0, 500.0])
    @pytest.mark.parametrize("gate", ["pairwise", "keys"])
    @pytest.mark.parametrize("visible", ["full", "intervals"])
    def test_keys_without_weight_above_all_others(gate: str, visible: str, above: float, dtype: torch.dtype) -> None:
        """In tiles that every query sees in full, where they raise the maximum: by little, by much, beyond every range.
        The first 32 queries are a tile of their own that no such key has to do with."""
        rows, keys, dim = 70, 70, 16
        q, k, v = (torch.randn(1, 2, n, dim).to(dtype) for n in (rows, keys, keys))
        q[..., 0], k[..., 0] = 1, 0
        k[:, :, 20:30, 0] = 4 * above  # natural units, at the scale below
        a, b = torch.rand(1, rows), torch.rand(1, keys)
        b[:, 20:30] = 1
        a[:, 32:] = (torch.arange(rows - 32) % 3 > 0).float()
        index = torch.arange(rows, dtype=torch.int32)
        bounds = torch.stack([index // 40, index * 0 + 66, index * 0 + 3])[None] if visible == "intervals" else None
        gated = (a if gate == "pairwise" else None, b, None, bounds, 0.25, 1.0, True)
        got = triton_launch.forward(q, k, v, *gated, True)
        exact = attention_reference(q.double(), k.double(), v.double(), *gated)
        fair = attention_reference(q.float(), k.float(), v.float(), *gated)
        for name, *values in zip(("out", "lse", "stats"), got, exact, fair, strict=True):
            values[2] = values[2].to(dtype).float() if name == "out" else values[2]
            assert_accurate(name, *values)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_gradients_at_any_scale_are_finite() -> None:
        for dtype in (SINGLE, HALF):
            q, k, v = (torch.randn(1, 1, 40, 16).to(dtype) for _ in range(3))
            for scale in (1e4, 6e20, 1e35):
                args = (None, None, None, None, scale, 1.0, True)
                out, lse, _ = triton_launch.forward(q, k, v, *args, False)
                grads = triton_launch.backward(torch.ones_like(out), None, q, k, v, out, lse, *args, True)
                assert out.isfinite().all()
                assert not any(g.isnan().any() for g in grads[:3])
                assert grads[2].isfinite().all()

    def test_operands_that_do_not_fit() -> None:
        x = draw(Case(**SMALL))
        good = [x.q, x.k, x.v, 1 - x.query_motion, x.key_motion, None, None, 0.3, 1.0, True, False]
        for i, other in (
            (1, x.k[:, :, 1:]), (1, x.k.half()), (2, x.v[:, :1]), (3, x.query_motion[:, 1:]),
            (4, x.key_motion.double()),
            (5, x.masks[1][:, 1:]), (6, torch.zeros(1, 3, 49, dtype=torch.int32)), (7, float("nan")), (8, -1.0),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="gate4d: "):
                triton_launch.forward(*good[:i], other, *good[i + 1 :])

    @pytest.mark.parametrize(("scale", "sign"), [(-0.4, -1), (0.0, 0)])
    def test_scales_that_are_not_positive(scale: float, sign: int) -> None:
        """A factor of q by another name, bit by bit."""
        x = draw(Case(**SMALL))

        def run(q, scale):
            rest = (1 - x.query_motion, x.key_motion, None, None, scale, 1.0, True)
            out, lse, _ = triton_launch.forward(q, x.k, x.v, *rest, False)
            return out, lse, *triton_launch.backward(x.grad_out, None, q, x.k, x.v, out, lse, *rest, True)

        out, lse, grad_q, *grads = run(x.q, scale)
        other_out, other_lse, other_grad_q, *others = run(x.q * sign, abs(scale) or 1.0)
        assert torch.equal(out, other_out)
        assert torch.equal(lse, other_lse)
        assert torch.equal(grad_q, other_grad_q * sign)
        assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))

    @pytest.mark.parametrize(
        "config",
        [Config(64, 16, 4, 1), Config(16, 64, 4, 1, registers=128), Config(32, 16, 4, 1)],
    )
    def test_other_tiles(config: Config) -> None:
        with ExitStack() as stack:
            for kind in PASSES:
                stack.enter_context(override(kind, config))
            check(Case("dropped_and_gated", "window", SINGLE, **SAME), "triton")

    def test_no_keys() -> None:
        """Everything is exact then: the output and all gradients are 0, and nothing is counted."""
        x = draw(Case("pairwise", "full", SINGLE, batch=1, queries=5, keys=0, dim=16, value_dim=24))
        values, grads = evaluate(_caller("triton"), x, "pairwise")
        assert values["out"].shape == (1, 2, 5, 24)
        assert (values["lse"] == -torch.inf).all()
        assert not any(values[name].any() for name in values if name != "lse")
        assert [g.shape for g in grads.values()] == [getattr(x, name).shape for name in grads]
        assert not any(g.any() for g in grads.values())

    def test_repeated_backward_is_the_same_bit_by_bit() -> None:
        x = draw(Case("pairwise", "window", SINGLE, **SAME))
        args = (x.q, x.k, x.v, 1 - x.query_motion, x.key_motion, None, x.visible.bounds, 0.2, 1.0, True)
        out, lse, _ = triton_launch.forward(*args, False)
        first, second = (
            triton_launch.backward(x.grad_out, x.grad_lse, *args[:3], out, lse, *args[3:], True) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize(
        ("gate", "visible", "dtype"),
        [
            ("none", "full", SINGLE),
            ("pairwise", "window", SINGLE),
            ("keys", "intervals", HALF),
            ("pairwise_1.7", "packed", SINGLE),
        ],
    )
    def test_received_attention(gate: str, visible: str, dtype: torch.dtype, poisoned_memory: None) -> None:
        """Against float64, as accurate as the same map in fp32; lse is given, rounded to fp32."""
        x = draw(Case(gate, visible, dtype, **SMALL))
        g = GATES[gate](x.query_motion, x.key_motion, x.masks) or MotionGate()
        bounds = None if x.visible is None else x.visible.bounds
        rest = g.query_score, g.key_score, bounds, 0.2, g.strength
        gated = (x.q.double(), x.k.double(), x.v.double(), *rest[:2], None, bounds, 0.2, g.strength, True)
        lse = attention_reference(*gated)[1].float()
        exact = received_reference(x.q.double(), x.k.double(), lse.double(), *rest)
        torch_result = received_reference(x.q.float(), x.k.float(), lse, *rest)
        got = received_triton.received_attention(x.q, x.k, lse, *rest)
        for name, *values in zip(("mean", "m2"), got, exact, torch_result, strict=True):
            assert_accurate(name, *values)

    @pytest.mark.parametrize(
        ("rows", "columns", "dim", "dtype", "unit"),
        [(1, 2, 1, SINGLE, 1), (33, 70, 17, SINGLE, 1), (50, 129, 40, HALF, 1e6), (64, 16, 130, HALF, 1e-6)],
    )
    @pytest.mark.parametrize("offset", [0.0, 100.0])
    def test_cross_moments(
        rows: int, columns: int, dim: int, dtype: torch.dtype, unit: float, offset: float, poisoned_memory: None
    ) -> None:
        """Against the products in float64; columns may lie outside the range of fp16, as sums over frames can."""
        x = [torch.randn(2, rows, h, dim).to(dtype).transpose(1, 2) for h in (2, 1)]
        y = unit * (torch.randn(2, columns, 3 * dim) + offset)
        mean, m2 = cross_triton.cross_moments(x, y, y.mean(1))
        z = torch.cat([p.transpose(1, 2).flatten(2) for p in x], 2).double() @ y.double().mT
        exact = z.var(-1, unbiased=False) * columns
        assert ((m2 - exact).abs() <= 1e-5 * exact).all(), ((m2 - exact).abs() / exact).max()
        assert (mean - z.mean(-1)).abs().max() <= 1e-5 * z.mean(-1).abs().max()

    @pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
    def test_sixteen_bit_columns_lose_nothing_that_counts(dtype: torch.dtype) -> None:
        y = torch.randn(3, 40, 50) * torch.tensor([1e-30, 1.0, 1e8])[:, None, None]
        y[0, 0] = 0
        high, low, unit = cross_triton._split(y, dtype)
        assert high.isfinite().all()
        error = (unit.double()[:, :, None] * (high.double() + low.double()) - y).abs()
        assert (error <= 2**-17 * y.abs() + 2**-36 * y.abs().amax((1, 2), keepdim=True)).all()

    @pytest.mark.parametrize(
        ("shape", "strides"),
        [((1, 2, 20, 16), (0, 2**31 + 16, 16, 1)), ((2, 1, 20, 16), (2**31 + 16, 0, 16, 1)),
         ((1, 1, 275, 16), (0, 0, 2**23 - 16, 1))],
        ids=["heads", "batch", "tokens"],
    )  # fmt: skip
    def test_offsets_beyond_32_bits(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        """Bit by bit what dense tensors give, in every kernel; of 4 GiB only the pages that are touched exist."""
        extent = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
        assert extent > 2**31
        try:
            far = torch.empty(extent, dtype=HALF).as_strided(shape, strides)
        except RuntimeError as e:
            pytest.skip(f"no address space: {e}")
        near = torch.randn(shape).to(HALF)
        far.copy_(near)
        gate = torch.rand(2, shape[0], shape[2]).unbind(0)
        results = []
        with ExitStack() as stack:
            for kind in PASSES:
                stack.enter_context(override(kind, Config(128, 128, 4, 1)))
            for x in (far, near):
                args = (*gate, None, None, 0.2, 1.0, True)
                out, lse, _ = triton_launch.forward(x, x, x, *args, False)
                grads = triton_launch.backward(x, None, x, x, x, out, lse, *args, True)
                received = received_triton.received_attention(x, x, lse, *gate, None, 0.2, 1.0)
                columns = torch.ones(shape[0], 3, shape[1] * shape[3])
                cross = cross_triton.cross_moments([x], columns, columns[:, 0])
                results.append((out, lse, *grads, *received, *cross))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert all(x.isfinite().all() for x in results[0])

    @triton.jit
    def _shifted_copy(X, Y, n, LOAD_AT: tl.constexpr, STORE_AT: tl.constexpr, BLOCK: tl.constexpr):
        lane = tl.arange(0, BLOCK)
        x = tl.load(X + lane + LOAD_AT, mask=lane < n, other=0.0)
        tl.store(Y + lane + STORE_AT, x, mask=lane < n)

    def test_addresses_outside_of_the_tensors_are_noticed() -> None:
        """What the other tests of this file rely on."""
        x, y = torch.randn(20), torch.zeros(20)
        _shifted_copy[(1,)](x, y, 20, 0, 0, 32)
        assert torch.equal(x, y)
        for n, load_at, store_at in ((21, 0, 0), (20, -1, 0), (20, 0, 1)):
            with pytest.raises(InterpreterError, match=r"1 of 2\d addresses are outside of every tensor"):
                _shifted_copy[(1,)](torch.randn(20), y[:20], n, load_at, store_at, 32)

    def test_bfloat16_is_rounded_as_torch_does() -> None:
        x = torch.cat([torch.randn(29) * 100, torch.tensor([torch.nan, torch.inf, 2**-133])])
        y = torch.empty(32, dtype=BF16)
        _shifted_copy[(1,)](x, y, 32, 0, 0, 32)
        assert torch.equal(y.nan_to_num(7), x.to(BF16).nan_to_num(7))

    def test_power_code() -> None:
        assert [power_code(s, False) for s in (0.5, 1, 1.5, 2, 3, 4, 5, 0.3)] == [1, 2, 3, 4, 0, 0, 0, 0]
        assert [power_code(s, True) for s in (0.5, 1, 2, 3)] == [1, 2, 0, 0]
