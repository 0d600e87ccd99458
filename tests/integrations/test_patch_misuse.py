"""patch() in unusual states: training, other contexts, other dtypes later, wrappers, modules that cannot be copied."""

import copy

import pytest
import torch
from standins import croco, vggt
from torch import nn

import gate4d


def images(dtype=torch.float32):
    return torch.rand(1, 2, 3, 28, 42, generator=torch.Generator().manual_seed(0)).to(dtype)


def largest(a, b):
    return float((a - b).detach().abs().max() / b.abs().max().detach())


def test_training_mode_and_dropout():
    model = vggt.Vggt()
    for block in (*model.aggregator.global_blocks, *model.aggregator.frame_blocks):
        block.attn.proj_drop.p = 0.5

    def run():
        torch.manual_seed(3)
        return model(images())["depth"]

    expected = run()
    assert largest(run(), model.eval()(images())["depth"]) > 1e-3  # dropout shows
    model.train()
    with gate4d.patch(model):
        assert largest(run(), expected) <= 1e-4
        assert all(m.training for m in model.modules())


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "autocast"])
def test_patched_inside_another_context(context):
    """The trial runs neither depend on the context nor leave its traces: training goes on afterwards."""
    model, there = vggt.Vggt(), {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    expected = torch.autograd.grad(model(images())["depth"].sin().sum(), model.aggregator.special)[0]
    with there[context]() if context in there else torch.autocast("cpu", torch.bfloat16):
        handle = gate4d.patch(model)
    got = torch.autograd.grad(model(images())["depth"].sin().sum(), model.aggregator.special)[0]
    assert largest(got, expected) <= 1e-4
    handle.remove()
    handle.remove()


@pytest.mark.parametrize(("build", "limit"), [(vggt.Vggt, 1e-6), (croco.Cut3r, 1e-3)])  # CUT3R: float16 in its encoder
@torch.no_grad()
def test_moved_to_another_dtype_after_patching(build, limit):
    model = build().eval()
    clip = images(torch.float64)
    args = (clip,) if build is vggt.Vggt else ([{"img": torch.rand(1, 3, 32, 48).double()} for _ in range(2)],)
    expected = leaves(copy.deepcopy(model).double()(*args))
    with gate4d.patch(model):
        for a, b in zip(leaves(model.double()(*args)), expected, strict=True):
            assert a.dtype == b.dtype == torch.float64
            assert largest(a, b) <= limit


def leaves(x):
    return [t for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, torch.Tensor)]


@torch.no_grad()
def test_wrappers():
    model = vggt.Vggt().eval()
    expected = model(images())["depth"]
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = []  # as on a machine without a GPU
    with gate4d.patch(wrapped) as handle:
        assert handle.table.rows[0].name.startswith("module.")
        assert largest(wrapped(images())["depth"], expected) <= 1e-4
    wrapped.device_ids = [0, 1]
    with pytest.raises(ValueError, match="every replica would call the attention of the first"):
        gate4d.patch(wrapped)
    assert "forward" not in model.aggregator.global_blocks[0].attn.__dict__


@torch.no_grad()
def test_compiled_before_the_patch():
    model = vggt.Vggt().eval()
    compiled = torch.compile(model, backend="eager")
    expected = compiled(images())["depth"]
    with gate4d.patch(compiled) as handle:
        for row in handle.table.select("global"):
            row.control.gate = lambda q, k: gate4d.MotionGate.keys(torch.linspace(0, 0.9, k.shape[2])[None])
        gated = model(images())["depth"]
        assert largest(compiled(images())["depth"], gated) <= 1e-5
        assert largest(gated, expected) > 1e-4
    assert torch.equal(compiled(images())["depth"], expected)
    torch._dynamo.reset()


class Recorder:
    def __call__(self, *args):
        pass

    def __deepcopy__(self, memo):
        raise AssertionError("a hook was copied")


def test_hooks_are_not_copied_and_what_cannot_be_copied_is_named():
    model = vggt.Vggt()
    attention = model.aggregator.frame_blocks[0].attn
    attention.k_norm.register_forward_hook(Recorder())
    attention.register_forward_pre_hook(Recorder())
    gate4d.patch(model).remove()
    assert len(attention.k_norm._forward_hooks) == len(attention._forward_pre_hooks) == 1
    attention.last = attention.proj.weight * 2  # such as a map kept from a training step
    with pytest.raises(ValueError, match=r"frame_blocks.0.attn .*cannot be copied for a trial run"):
        gate4d.patch(model)
    assert "forward" not in model.aggregator.global_blocks[0].attn.__dict__
