"""The registered operators inside torch: opcheck, compilation, export, autocast, function transforms, autograd."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import require_backend
from helpers.attention_cases import Case, draw

import gate4d
from gate4d import MotionGate, TokenLayout, Visibility, gated_attention

ROOT = Path(__file__).parents[2]
attend = partial(gated_attention, backend="cpu")


@pytest.fixture(autouse=True)
def _needs_the_kernel(request):
    if "without_kernel" not in request.node.name:
        require_backend("cpu")


def operands(gate: str = "pairwise", dtype: torch.dtype = torch.float32) -> tuple:
    """The arguments of ``attention_forward`` for one gate, all differentiable ones requiring gradients."""
    q, k, v = (torch.randn(2, 2, n, 8).to(dtype).requires_grad_() for n in (5, 7, 7))
    a, b = torch.rand(2, 5, requires_grad=True), torch.rand(2, 7, requires_grad=True)
    bounds = Visibility.intervals(torch.zeros(5).long(), torch.tensor([7, 3, 0, 5, 7]), 1).bounds
    mask = torch.rand(2, 7) > 0.8
    gate_arguments = {
        "none": (None, None, None, None),
        "pairwise": (a, b, None, bounds),
        "keys": (None, b, mask, None),
        "drop": (None, None, mask, bounds),
    }[gate]
    return q, k, v, *gate_arguments, 0.3, 1.5, gate != "keys"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row_stats", [True, False])
@pytest.mark.parametrize("gate", ["none", "pairwise", "keys", "drop"])
def test_opcheck_forward(gate, row_stats, dtype):
    arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in operands(gate, dtype))
    torch.library.opcheck(torch.ops.gate4d.attention_forward, (*arguments, row_stats))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score_grads", [True, False])
@pytest.mark.parametrize("gate", ["none", "pairwise", "keys", "drop"])
def test_opcheck_backward(gate, score_grads, dtype):
    arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in operands(gate, dtype))
    out, lse, _ = torch.ops.gate4d.attention_forward(*arguments, False)
    for grad_lse in (None, torch.randn_like(lse)):
        inputs = torch.randn_like(out), grad_lse, *arguments[:3], out, lse, *arguments[3:], score_grads
        torch.library.opcheck(torch.ops.gate4d.attention_backward, inputs)


# --- compilation ------------------------------------------------------------------------------------------------------


def block(q, k, v, query, key, visible):
    """A gated call with a little around it, as in a model."""
    out, aux = attend(q * 1.5, k, v, gate=MotionGate.pairwise(query, key), visible=visible, return_aux=True)
    return out.transpose(1, 2).flatten(2).sin(), aux.lse


def leaves(n: int, batch: int = 2) -> list[torch.Tensor]:
    inputs = [torch.randn(batch, 2, n, 8) for _ in range(3)] + [torch.rand(batch, n) for _ in range(2)]
    return [x.requires_grad_() for x in inputs]


def with_grads(f, inputs, visible):
    out, lse = f(*inputs, visible)
    return out, lse, *torch.autograd.grad(out.sum() + lse.cos().sum(), inputs)


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_forward_and_backward(compiler):
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    inputs, visible = leaves(12), Visibility.frame_causal(TokenLayout(4, 3), window=2)
    assert_same(with_grads(compiled, inputs, visible), with_grads(block, inputs, visible))
    with torch.no_grad():
        assert_same(compiled(*inputs, None), block(*inputs, None))


def test_compiled_with_dynamic_shapes():
    torch.compiler.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=count)
    for n in (12, 20, 33):
        inputs = leaves(n)
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 2 if x.dim() == 4 else 1)
        assert_same(with_grads(compiled, inputs, None), with_grads(block, inputs, None))
    assert count.frame_count == 1


@pytest.mark.parametrize("kind", [MotionGate.pairwise, MotionGate.queries])
def test_compiled_with_the_strength_as_an_argument(kind):
    """One graph serves every value, forward and backward; an int is another."""
    torch.compiler.reset()
    q, k, v, motion, _ = leaves(12)

    def call(motion, strength, scale):
        gate = kind(motion, strength=strength)
        out, aux = attend(q, k, v, gate=gate, scale=scale, visible=VISIBLE_12, return_aux=True)
        return out.sin() + aux.lse[..., None]

    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for i in range(10 if kind is MotionGate.pairwise else 3):  # more values than torch.compile would make graphs for
        got, expected = (f(motion, 0.5 + 0.25 * i, 0.3 + 0.01 * i) for f in (compiled, call))
        torch.testing.assert_close(got, expected)
        wanted = (motion, q, v)
        assert_same(torch.autograd.grad(got.sum(), wanted), torch.autograd.grad(expected.sum(), wanted))
    if kind is MotionGate.pairwise:
        assert count.frame_count == 1
    torch.testing.assert_close(compiled(motion, 2, 0.3), call(motion, 2, 0.3))
    with torch.no_grad():
        torch.testing.assert_close(compiled(motion, 1.75, 0.3), call(motion, 1.75, 0.3))
    with pytest.raises(Exception, match="strength must be finite"):
        compiled(motion, -1.0, 0.3)


@pytest.mark.parametrize("row_stats", [True, False])
def test_opcheck_of_the_operators_for_symbols(row_stats):
    *tensors, scale, strength, renormalize = operands("pairwise")
    tensors = [x if x is None else x.detach() for x in tensors]
    numbers = torch.tensor([scale, strength], dtype=torch.float64)
    arguments = (*tensors, numbers, renormalize, row_stats)
    torch.library.opcheck(torch.ops.gate4d.attention_forward_symbolic, arguments)
    out, lse, _ = torch.ops.gate4d.attention_forward_symbolic(*arguments)
    inputs = torch.randn_like(out), None, *tensors[:3], out, lse, *tensors[3:], numbers, renormalize, True
    torch.library.opcheck(torch.ops.gate4d.attention_backward_symbolic, inputs)


VISIBLE_12 = Visibility.frame_causal(TokenLayout(4, 3))
N = 12
BUILT = {
    "frame_causal": lambda start, end, cu: Visibility.frame_causal(TokenLayout(4, 3), window=2, sinks=1),
    "ragged": lambda start, end, cu: Visibility.frame_causal(TokenLayout(3, [3, 4, 5])),
    "per_frame": lambda start, end, cu: Visibility.per_frame(TokenLayout(4, 3)),
    "packed": lambda start, end, cu: Visibility.packed([0, 5, 5, 12]),
    "packed_cu_seqlens": lambda start, end, cu: Visibility.packed(cu),
    "packed_keys_apart": lambda start, end, cu: Visibility.packed(cu, torch.tensor([0, 1, 2, 12])),
    "intervals": lambda start, end, cu: Visibility.intervals(start, end),
    "with_rows": lambda start, end, cu: Visibility.intervals(start[:6], end[:6]).with_rows(
        Visibility.frame_causal(TokenLayout(4, 3), first_query_frame=2)
    ),
    "intervals_and_sinks": lambda start, end, cu: Visibility.intervals(start, end, 2),
}


@pytest.mark.parametrize(
    ("name", "dynamic"), [*((n, None) for n in BUILT), *((n, True) for n in ("frame_causal", "packed_cu_seqlens"))]
)
def test_visibility_built_inside_a_compiled_function(name, dynamic):
    torch.compiler.reset()
    inputs = leaves(N)
    start, end, cu = torch.arange(N) // 2, torch.arange(N), torch.tensor([0, 5, 5, N])

    def call(*args):
        return block(*args[:5], BUILT[name](*args[5:]))

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = [f(*inputs, start, end, cu) for f in (compiled, call)]
    assert_same(*([*r, *torch.autograd.grad(r[0].sum() + r[1].nan_to_num(0, 0, 0).sum(), inputs)] for r in results))


@pytest.mark.parametrize(
    ("name", "changed"),
    [("intervals", {0: -1}), ("intervals", {1: N + 1}), ("with_rows", {1: N + 1}),
     ("packed_cu_seqlens", {2: [0, 7, 5, N]}), ("packed_cu_seqlens", {2: [0, 5, 5, N - 1]}),
     ("packed_cu_seqlens", {2: [1, 5, 5, N]})],
)  # fmt: skip
def test_bad_visibility_built_inside_a_compiled_function(name, changed):
    """Values that cannot be read while it is traced are checked when it runs."""
    torch.compiler.reset()
    inputs = [x.detach() for x in leaves(N)]
    tensors = [torch.arange(N) // 2, torch.arange(N), torch.tensor([0, 5, 5, N])]

    def call(*args):
        return block(*args[:5], BUILT[name](*args[5:]))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled(*inputs, *tensors)
    for i, values in changed.items():
        tensors[i] = torch.tensor(values).expand_as(tensors[i]).clone()
    for f in (compiled, call):
        with pytest.raises((RuntimeError, ValueError)):
            f(*inputs, *tensors)


@pytest.mark.parametrize(("compiler", "dynamic"), [("aot_eager", True), ("inductor", None)])
def test_compiled_statistics(compiler, dynamic):
    torch.compiler.reset()
    q, k, v, motion, _ = (x.detach() for x in leaves(N))

    def call(q, k, v, motion, strength):
        gate, visible = MotionGate.pairwise(motion, strength=strength), Visibility.per_frame(TokenLayout(4, 3))
        _, aux = attend(q, k, v, gate=gate, visible=visible, return_aux=True)
        found = [
            gate4d.received_attention(q, k, aux.lse, gate=gate, visible=visible),
            gate4d.received_attention(q, k, aux.lse, over=("queries",), backend="chunked", gate=gate, visible=visible),
            gate4d.cross_moments(q, k, method="stream"),
            gate4d.cross_moments([q, k], [k[:, None], v[:, None]], method="covariance"),
            gate4d.logit_moments(q, k, over=("heads", "queries")),
        ]
        return [x for m in found for x in (m.count, m.mean, m.m2)]

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=compiler)
    assert_same(compiled(q, k, v, motion, 1.5), call(q, k, v, motion, 1.5))


def test_first_call_ever_is_compiled():
    """In a fresh process, before any eager call has registered or cached anything."""
    code = """
        import torch, gate4d
        f = torch.compile(gate4d.gated_attention, fullgraph=True, backend="aot_eager")
        q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
        gate = gate4d.MotionGate.keys(torch.rand(1, 9))
        out = f(q, k, v, gate=gate)
        torch.testing.assert_close(out, gate4d.gated_attention(q, k, v, gate=gate))
        out.sum().backward()
        assert q.grad.isfinite().all()
    """
    run_python(code)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, motion):
            return attend(q, k, v, gate=MotionGate.keys(motion))

    q, k, v, _, key = (x.detach() for x in leaves(12))
    program = torch.export.export(Module(), (q, k, v, key))
    assert any("gate4d.attention_forward" in str(n.target) for n in program.graph.nodes)
    torch.testing.assert_close(program.module()(q, k, v, key), Module()(q, k, v, key))


# --- modes ------------------------------------------------------------------------------------------------------------


def test_autocast():
    q, k, v, query, key = leaves(12)
    gate = MotionGate.pairwise(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, aux = attend(q, k, v, gate=gate, return_aux=True)
        wide = gated_attention(q.double(), k.double(), v.double(), gate=gate)
    assert (out.dtype, aux.lse.dtype, wide.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    assert torch.equal(out, attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), gate=gate))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(out, attend(q, k.bfloat16(), v.bfloat16(), gate=gate))  # dtypes may differ before the cast
    grads = torch.autograd.grad(out.float().sum(), (q, k, v, query, key))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    q, k, v, query, key = leaves(12)
    expected = attend(q, k, v, gate=MotionGate.pairwise(query, key))
    with mode():
        out = attend(q, k, v, gate=MotionGate.pairwise(query, key))
    assert not out.requires_grad
    assert torch.equal(out, expected)


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (2, 4), (0, 3)])
def test_partial_gradients(wanted):
    """Whatever part requires a gradient gets the one it gets when all do."""
    inputs = leaves(12)
    full = with_grads(block, inputs, None)[2:]
    part = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    out, lse = block(*part, None)
    grads = torch.autograd.grad(out.sum() + lse.cos().sum(), [part[i] for i in wanted])
    assert all(torch.equal(g, full[i]) for g, i in zip(grads, wanted, strict=True))


def test_non_leaf_inputs_and_either_output_alone():
    q, k, v, query, key = leaves(12)
    gate = MotionGate.pairwise(query.sigmoid(), key.sigmoid())
    out, aux = attend(q * 2, k * 2, v * 2, gate=gate, return_aux=True)
    inputs = (q, k, v, query, key)
    both = torch.autograd.grad(out.sum() + aux.lse.sum(), inputs, retain_graph=True)
    from_out = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    from_lse = torch.autograd.grad(aux.lse.sum(), inputs, allow_unused=True)
    assert not from_lse[2].any()
    for b, o, s in zip(both, from_out, from_lse, strict=True):
        torch.testing.assert_close(b, o + s)


@pytest.mark.parametrize("loss", [torch.sum, lambda x: x.sin().sum()], ids=["constant", "varying"])
@pytest.mark.parametrize("which", range(5))
def test_second_derivatives_are_refused(which, loss):
    """Also where the incoming gradient is a constant, so that the first derivatives look like constants."""
    inputs = leaves(6)
    out, lse = block(*inputs, None)
    firsts = torch.autograd.grad(loss(out) + loss(lse), inputs, create_graph=True)
    for first, g in zip(firsts, with_loss_grads(inputs, loss), strict=True):
        assert torch.equal(first, g)
    for i in range(5):
        with pytest.raises(NotImplementedError, match="backend='reference' has second"):
            torch.autograd.grad(firsts[which].square().sum(), inputs[i], retain_graph=True)


def with_loss_grads(inputs, loss):
    out, lse = block(*inputs, None)
    return torch.autograd.grad(loss(out) + loss(lse), inputs)


def test_nested_function_transforms_are_refused():
    inputs = [x.detach() for x in leaves(6)]

    def first(x):
        return torch.func.grad(lambda y: plain(y, *inputs[1:]).sum())(x).sum()

    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.func.grad(first)(inputs[0])
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.func.jacrev(torch.func.jacrev(lambda x: plain(x, *inputs[1:]).sum()))(inputs[0])
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.hessian(lambda x: plain(x, *inputs[1:]).sum())(inputs[0])


def test_the_reference_has_second_derivatives():
    """What the error names instead: right where rows see nothing and where weights are 0, too."""
    inputs = [x.detach().double().requires_grad_() for x in leaves(4, batch=1)]
    visible = Visibility.intervals(torch.tensor([0, 1, 4, 2]), torch.tensor([3, 4, 4, 3]))

    def loss(q, k, v, query, key):
        gate = MotionGate(1 - query, key, strength=1.5)  # without the check of the range: numerical steps leave it
        out, aux = gated_attention(q, k, v, gate=gate, visible=visible, return_aux=True)
        return out.sin().sum() + aux.lse[:, :, :2].sin().sum()

    assert torch.autograd.gradgradcheck(loss, inputs)


def test_compiled_second_derivatives_are_refused():
    """By torch itself."""
    torch.compiler.reset()
    inputs = leaves(6)
    out, lse = torch.compile(block, fullgraph=True, backend="aot_eager")(*inputs, None)

    def second():
        (first,) = torch.autograd.grad(out.sum() + lse.sum(), inputs[:1], create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs[0])

    with pytest.raises(RuntimeError, match="double backward"):
        second()


# --- function transforms ----------------------------------------------------------------------------------------------


def plain(q, k, v, query, key):
    return attend(q, k, v, gate=MotionGate.pairwise(query, key), visible=VISIBLE)


VISIBLE = Visibility.frame_causal(TokenLayout(3, 2))


def stacked(size: int) -> list[torch.Tensor]:
    return [torch.stack(x) for x in zip(*([y.detach() for y in leaves(6)] for _ in range(size)), strict=True)]


def test_vmap():
    inputs = stacked(3)
    expected = torch.stack([plain(*x) for x in zip(*inputs, strict=True)])
    torch.testing.assert_close(torch.vmap(plain)(*inputs), expected)
    shared = torch.vmap(plain, in_dims=(0, None, 1, None, 0))  # some shared, some along another axis
    one = [inputs[0], inputs[1][0], inputs[2].movedim(0, 1), inputs[3][0], inputs[4]]
    expected = torch.stack([plain(inputs[0][i], one[1], inputs[2][i], one[3], inputs[4][i]) for i in range(3)])
    torch.testing.assert_close(shared(*one), expected)


def test_func_grad_and_vmap_of_grad():
    inputs = stacked(3)

    def loss(*x):
        return plain(*x).sin().sum()

    grad = torch.func.grad(loss, argnums=tuple(range(5)))
    for i in range(3):
        item = [x[i].clone().requires_grad_() for x in inputs]
        assert_same(grad(*(x.detach() for x in item)), torch.autograd.grad(loss(*item), item))
    expected = [torch.stack(g) for g in zip(*(grad(*x) for x in zip(*inputs, strict=True)), strict=True)]
    assert_same(torch.vmap(grad)(*inputs), expected)


def test_grad_of_vmap():
    inputs = stacked(3)
    grads = torch.func.grad(lambda *x: torch.vmap(plain)(*x).sin().sum(), argnums=(0, 3))(*inputs)
    required = [x.clone().requires_grad_() for x in inputs]
    loss = sum(plain(*x).sin().sum() for x in zip(*required, strict=True))
    expected = torch.autograd.grad(loss, (required[0], required[3]))
    assert_same(grads, expected)
    loss = torch.vmap(plain)(*required).sin().sum()
    assert_same(torch.autograd.grad(loss, (required[0], required[3])), expected)


# --- the package ------------------------------------------------------------------------------------------------------


def run_python(code: str, **environment: str) -> str:
    import os

    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_needs_torch_and_numpy_only_without_kernel():
    """In a process where nothing else can be imported."""
    run_python("""
        import importlib.metadata, re, sys
        import numpy, torch
        needed = [re.match(r"[A-Za-z0-9_]+", r.replace("-", "_"))[0] for r in importlib.metadata.requires("torch")]
        allowed = {"torch", "numpy", "gate4d", "functorch", *needed} - {"triton"} | sys.stdlib_module_names
        class Block:
            def find_spec(self, name, path=None, target=None):
                top = name.split(".")[0]
                if top not in allowed and not top.startswith(("_", "torchgen")):
                    raise ModuleNotFoundError(f"blocked: {name}")
        sys.meta_path.insert(0, Block())
        for name in ("rich", "matplotlib", "triton", "scipy", "sklearn", "PIL", "av"):
            assert name not in sys.modules, name
        import gate4d
        q = torch.randn(1, 1, 4, 8)
        gate = gate4d.MotionGate.keys(torch.rand(1, 4))
        assert gate4d.gated_attention(q, q, q, gate=gate).isfinite().all()
    """)


def test_poisoned_memory_reaches_the_kernel(poisoned_memory):
    """The outputs that C++ allocates are full of NaN before it writes: an empty key range shows what is written."""
    x = draw(Case("pairwise", "empty", queries=70, keys=90))
    assert torch.ops.aten.new_empty(x.q, [4]).isnan().all()  # what the stable ABI calls
    assert attend(x.q, x.k, x.v, visible=x.visible).isfinite().all()
