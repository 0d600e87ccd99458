"""The Triton kernel of norm + RoPE-2D, run by Triton's interpreter against the float64 reference.

Without TRITON_INTERPRET the kernels are compiled when they are imported, so the cases run in a process of their own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="pip install gate4d[triton]")

from helpers.interpreted import INSIDE, run_interpreted

if not INSIDE:

    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    from helpers.accuracy import assert_accurate, assert_accurate_gradient
    from helpers.norm_rope_cases import CASES, EPS, draw, evaluate
    from torch import Tensor

    from gate4d.kernels.norm_rope import op
    from gate4d.kernels.norm_rope import triton as kernels
    from gate4d.nn import RoPE2D, norm_rope

    @pytest.fixture(autouse=True)
    def _triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Tensors on the CPU take the path of a GPU's, with the interpreted kernels behind the operators."""
        monkeypatch.setattr(op, "fits", lambda x, exact: x.dtype != torch.float64)
        library = torch.library.Library("gate4d", "IMPL")
        library.impl("norm_rope_forward", kernels.forward, "CPU")
        library.impl("norm_rope_backward", kernels.backward, "CPU")
        yield
        library._destroy()

    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_values_and_gradients(case, affine: bool, poisoned_memory: None) -> None:
        """As accurate as torch at that precision; nothing written beside the view, nothing read outside of it."""
        x = draw(case, affine)
        before, out_before = x.x_buffer.clone(), x.out_buffer.clone()
        with torch.no_grad():
            assert norm_rope(x.x, out=x.out, weight=x.weight, bias=x.bias, **x.settings) is x.out
        assert torch.equal(x.x_buffer.nan_to_num(7), before.nan_to_num(7))
        written = int(x.out_buffer.isfinite().sum()) - int(out_before.isfinite().sum())
        assert written == x.out.numel()
        want, rounded, got = (evaluate(norm_rope, x, d) for d in (torch.float64, None, case.dtype))
        assert torch.equal(got[0], x.out)
        for name, g, exact, plain in zip(("out", "x", "weight", "bias"), got, want, rounded, strict=False):
            check = assert_accurate if name == "out" else assert_accurate_gradient
            check(name, g, exact, plain)
        if not case.norm and not case.rotate:
            assert torch.equal(x.out, x.x)  # values appended to a cache are copied

    @pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (63, 5), (100, 17), (130, 16)])
    def test_sizes_around_the_tile(tokens: int, heads: int, poisoned_memory: None) -> None:
        """Tiles of 64 tokens, groups of 4 and 16 heads."""
        x = torch.randn(2, heads, tokens, 64)
        weight, bias, grad = torch.rand(64) + 0.5, torch.randn(64), torch.randn(2, heads, tokens, 64)
        positions = torch.randint(-3, 60, (2, tokens, 2))

        def run(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
            leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
            monkey = {"weight": leaves[1], "bias": leaves[2], "eps": EPS, "rope": RoPE2D(), "positions": positions}
            out = norm_rope(leaves[0], backend=backend, **monkey)
            return out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))

        results = run(torch.float32, "auto"), run(torch.float64, "torch"), run(torch.float32, "torch")
        for name, *values in zip(("out", "x", "weight", "bias"), *results, strict=True):
            assert_accurate(name, *values)

    @pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True)])
    def test_weight_or_bias_alone(weight: bool, bias: bool) -> None:
        x, grad = torch.randn(1, 2, 7, 32), torch.randn(1, 2, 7, 32)
        leaf = torch.rand(32) + 0.5

        def run(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
            p = leaf.to(dtype).requires_grad_()
            leaves = x.to(dtype).requires_grad_(), p
            out = norm_rope(leaves[0], weight=p if weight else None, bias=p if bias else None, eps=EPS, backend=backend)
            return out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))

        results = run(torch.float32, "auto"), run(torch.float64, "torch"), run(torch.float32, "torch")
        for name, *values in zip(("out", "x", "parameter"), *results, strict=True):
            assert_accurate(name, *values)

    def test_only_the_gradients_asked_for() -> None:
        x = torch.randn(1, 2, 5, 16, requires_grad=True)
        weight, bias = torch.rand(16), torch.randn(16, requires_grad=True)
        norm_rope(x, weight=weight, bias=bias, eps=EPS).sum().backward()
        assert weight.grad is None
        torch.testing.assert_close(bias.grad, torch.full((16,), 10.0))
        assert x.grad.shape == x.shape

    def test_repeated_backward_is_the_same_bit_by_bit() -> None:
        x = torch.randn(2, 3, 130, 64)
        args = x, x + 1, torch.rand(64), torch.randint(0, 9, (1, 130, 2)), torch.rand(16), True, EPS, True
        first, second = (kernels.backward(*args) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("of", ["x", "weight", "grad_out"])
    def test_a_second_derivative_is_an_error(of: str) -> None:
        """Also beside a term that has one: a silent 0 would be a wrong gradient."""
        leaves = {"x": torch.randn(1, 1, 3, 16), "weight": torch.rand(16), "grad_out": torch.randn(1, 1, 3, 16)}
        leaf = leaves[of].requires_grad_()
        x = leaves["x"].requires_grad_()
        out = norm_rope(x, weight=leaves["weight"], eps=EPS)
        (grad,) = torch.autograd.grad(out, x, leaves["grad_out"], create_graph=True)
        with pytest.raises(RuntimeError, match="norm_rope has first derivatives only"):
            torch.autograd.grad(grad.square().sum() + leaf.sum(), leaf)

    @pytest.mark.parametrize("angle", [1.0, 100.0, 3000.0])
    def test_large_positions(angle: float) -> None:
        """Sine and cosine of large angles: what is left after whole turns must not lose its digits."""
        x = torch.tensor([1.0, 1.0, 1.0, 1.0]).expand(1, 1, 400, 4).contiguous()
        positions = torch.randint(-int(angle), int(angle) + 1, (1, 400, 2))
        got = norm_rope(x, rope=RoPE2D(), positions=positions)
        exact, plain = (
            norm_rope(x.to(d), rope=RoPE2D(), positions=positions, backend="torch") for d in (torch.float64, x.dtype)
        )
        assert_accurate("out", got, exact, plain)

    @pytest.mark.parametrize("axis", [0, 1, 2, 3])
    def test_offsets_beyond_32_bits(axis: int) -> None:
        """Items, heads, tokens or features more than 2**31 elements apart; only the pages touched exist."""
        shape, strides = [1, 1, 1, 16], [0, 0, 0, 1]
        if axis == 3:
            strides[3] = 2**27 + 16  # 15 of them
        else:
            shape[axis], strides[axis] = 2, 2**31 + 16
        extent = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
        assert extent > 2**30
        try:
            far_x, far = (torch.empty(extent, dtype=torch.float16).as_strided(shape, strides) for _ in range(2))
        except RuntimeError as e:
            pytest.skip(f"no address space: {e}")
        x, near = torch.randn(shape).half(), torch.empty(shape, dtype=torch.float16)
        far_x.copy_(x)
        rest = torch.rand(16), None, torch.randint(0, 9, (shape[0], shape[2], 2)), torch.rand(4), True, EPS
        for source, to in ((far_x, far), (x, near)):
            kernels.forward(source, to, *rest)
        assert near.isfinite().all()
        assert torch.equal(far, near)
        grads = [kernels.backward(x, source, rest[0], *rest[2:], True) for source in (far_x, x)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_operators() -> None:
        """Schemas, mutation, fake kernels: what torch checks of a custom operator."""
        x, positions = torch.randn(2, 3, 5, 16), torch.randint(0, 9, (1, 5, 2))
        rest = positions, torch.rand(4), True, EPS
        checks = ("test_schema", "test_faketensor")
        forward = x, torch.empty_like(x), torch.rand(16), torch.rand(16), *rest
        torch.library.opcheck(torch.ops.gate4d.norm_rope_forward.default, forward, test_utils=checks)
        for affine in (True, False):
            backward = torch.randn_like(x), x, torch.rand(16), *rest, affine
            torch.library.opcheck(torch.ops.gate4d.norm_rope_backward.default, backward, test_utils=checks)

    def test_empty() -> None:
        x = torch.randn(1, 2, 0, 16, requires_grad=True)
        weight = torch.rand(16, requires_grad=True)
        out = norm_rope(x, weight=weight, eps=EPS)
        assert out.shape == x.shape
        out.sum().backward()
        assert not weight.grad.any()
