"""Every family's stand-in: patched and unpatched give the same, and the patch leaves no trace."""

import copy
import io
import pickle

import pytest
import torch
from standins import croco, others, vggt

import gate4d
from gate4d import unpatch


def leaves(x):
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for y in (x.values() if isinstance(x, dict) else x) for t in leaves(y)]


def clip(patch, batch=2, frames=3):
    return torch.rand(batch, frames, 3, 2 * patch, 3 * patch)


def views(batch=2, frames=3, mask=False):
    out = [{"img": torch.rand(batch, 3, 32, 48)} for _ in range(frames)]
    if mask:
        dynamic = torch.zeros(batch, 32, 48, dtype=torch.bool)
        dynamic[:, :20, :20] = True
        out = [{**v, "atten_mask": dynamic} for v in out]
    return out


def stream3r_session(mode):
    def run(model, images):
        session = vggt.Session(model, mode)
        return [session.forward_stream(image) for image in images]

    return run


def frames_of(patch, count):
    return lambda: (list(torch.rand(count, 2, 3, 2 * patch, 3 * patch)),)


# name: model, inputs, how to run it, family expected among the rows
CASES = {
    "dust3r": (croco.Dust3r, lambda: views(frames=2), None, "croco"),
    "easi3r": (croco.Easi3r, lambda: views(1, 2), None, "easi3r"),
    "easi3r masked": (croco.Easi3r, lambda: views(1, 2, mask=True), None, "easi3r"),
    "cut3r": (croco.Cut3r, lambda: (views(),), None, "cut3r"),
    "ttt3r": (croco.Ttt3r, lambda: (views(),), None, "ttt3r"),
    "vggt": (vggt.Vggt, lambda: (clip(14),), None, "vggt"),
    "fastvggt": (vggt.FastVggt, lambda: (clip(14, frames=2),), None, "fastvggt"),
    "vggt4d": (vggt.Vggt4d, lambda: (clip(14),), None, "vggt4d"),
    "vggt4d masked": (vggt.Vggt4d, lambda: (clip(14), torch.arange(36).reshape(2, 3, 6) % 3 == 0), None, "vggt4d"),
    "streamvggt": (vggt.StreamVggt, lambda: (clip(14),), None, "streamvggt"),
    "streamvggt stream": (vggt.StreamVggt, frames_of(14, 7), vggt.StreamVggt.inference, "streamvggt"),
    "stream3r causal": (vggt.Stream3r, lambda: (clip(14, frames=7), "causal"), None, "stream3r"),
    "stream3r window": (vggt.Stream3r, lambda: (clip(14, frames=7), "window"), None, "stream3r"),
    "stream3r full": (vggt.Stream3r, lambda: (clip(14, frames=7), "full"), None, "stream3r"),
    "stream3r session": (vggt.Stream3r, frames_of(14, 8), stream3r_session("causal"), "stream3r"),
    "stream3r window session": (vggt.Stream3r, frames_of(14, 8), stream3r_session("window"), "stream3r"),
    "pi3": (others.Pi3, lambda: (clip(14),), None, "pi3"),
    "vggt-omega": (others.Omega, lambda: (clip(16),), None, "vggt-omega"),
    "generic": (others.Plain, lambda: (clip(16),), None, "generic (attention call)"),
    "generic written out": (lambda: others.Plain(written_out=True), lambda: (clip(16),), None, "generic (recomputed)"),
}
TRAINS = [n for n in CASES if not any(w in n for w in ("stream", "session", "masked"))] + [
    "streamvggt",
    "stream3r window",
]
ONE_OF_EACH = ["dust3r", "easi3r", "ttt3r", "vggt4d", "streamvggt", "stream3r window", "pi3", "vggt-omega", "generic"]


@pytest.fixture
def case(request):
    build, inputs, run, family = CASES[request.param]
    torch.manual_seed(0)
    model, args = build().eval(), inputs()
    for p in model.parameters():  # fresh models are nearly uniform in their attention
        if p.dim() > 1:
            p.data.mul_(2)
    return model, (lambda m: leaves((run or torch.nn.Module.__call__)(m, *args))), family


def cases(names=CASES):
    return pytest.mark.parametrize("case", names, indirect=True)


def assert_same(got, expected, limit=1e-4):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(b).all()
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() <= limit * b.abs().max()


@cases()
@torch.no_grad()
def test_outputs_equal_and_undo_is_exact(case):
    model, run, family = case
    expected, keys = run(model), list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    with gate4d.patch(model) as handle:
        assert family in handle.table.families
        assert_same(run(model), expected)
        assert list(model.state_dict()) == keys
        assert [type(m) for m in model.modules()] == classes
        # The patch is in use: every module that ran was called through its replacement.
        assert all(row.tokens is not None for row in handle.table)
    assert all(torch.equal(a, b) for a, b in zip(run(model), expected, strict=True))
    assert not any("forward" in m.__dict__ for m in model.modules())


@cases(TRAINS)
def test_gradients_equal(case):
    model, run, _ = case
    model.train()

    def gradients():
        model.zero_grad()
        sum(x.sin().sum() for x in run(model)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with gate4d.patch(model):
        got = gradients()
    assert got.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, g in expected.items():
        assert (got[name] - g).abs().max() <= 1e-4 * max(g.abs().max(), 1e-2 * largest), name


@cases(ONE_OF_EACH)
@torch.no_grad()
def test_copies_and_pickles_stay_patched(case):
    model, run, _ = case
    expected = run(model)
    handle = gate4d.patch(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)
    handle.remove()
    for other in copies:
        rows = gate4d.inspect(other).rows
        assert all(row.control is not None and row.control.module is row.module for row in rows)
        assert_same(run(other), expected)
        assert all(row.tokens is not None for row in rows)
        unpatch(other)
        assert all(torch.equal(a, b) for a, b in zip(run(other), expected, strict=True))
    assert all(row.control is None for row in gate4d.inspect(model))


@cases(ONE_OF_EACH)
@torch.no_grad()
def test_half(case):
    """A patched model goes to 16 bits; its error to fp32 is that of the unpatched model in 16 bits."""
    model, run, _ = case
    exact = run(model)
    hook = model.register_forward_pre_hook(lambda _, args: tuple(to_half(a) for a in args))
    plain = run(copy.deepcopy(model).bfloat16())
    handle = gate4d.patch(model)
    got = run(model.bfloat16())
    handle.remove()
    hook.remove()
    for a, b, c in zip(got, plain, exact, strict=True):
        assert a.dtype == b.dtype
        assert torch.isfinite(a).all()
        bound = 2 * (b.float() - c).abs().max() + 2**-8 * c.abs().max()
        assert (a.float() - c).abs().max() <= bound


def to_half(x):
    if isinstance(x, dict):
        return {k: to_half(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [to_half(v) for v in x]
    return x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@cases(["dust3r", "vggt", "vggt-omega"])
@torch.no_grad()
def test_compiles(case):
    model, run, _ = case
    expected = run(model)
    with gate4d.patch(model):
        model.compile(backend="eager", fullgraph=True)
        assert_same(run(model), expected)
    torch._dynamo.reset()


@torch.no_grad()
def test_hooks_survive():
    model, calls = vggt.Vggt().eval(), []
    attention = model.aggregator.global_blocks[0].attn
    attention.register_forward_hook(lambda *_: calls.append("module"))
    attention.k_norm.register_forward_hook(lambda *_: calls.append("k_norm"))
    with gate4d.patch(model):
        assert calls == []  # the exercise ran on a copy without hooks
        model(clip(14))
    assert calls == ["k_norm", "module"]


@torch.no_grad()
def test_changing_frames_and_resolution_without_cache():
    model = vggt.Vggt().eval()
    inputs = [torch.rand(1, 2, 3, 28, 42), torch.rand(2, 3, 3, 42, 28), torch.rand(1, 1, 3, 14, 14)]
    expected = [leaves(model(x)) for x in inputs]
    with gate4d.patch(model):
        for x, e in zip(inputs, expected, strict=True):
            assert_same(leaves(model(x)), e)
