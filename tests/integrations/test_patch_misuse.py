"""patch() in unusual states: training, other contexts, other dtypes later, wrappers, modules that cannot be copied."""

import copy
import os
import subprocess
import sys
import threading

import pytest
import torch
from standins import croco, unknown, vggt
from torch import nn

import gate4d
from gate4d.integrations import base


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


def traces(model):
    """What a patch, or a trial run, could leave in a model."""
    return [{n: id(v) for n, v in vars(m).items()} for m in model.modules()]


def in_threads(count, work):
    failed = []

    def run(number):
        try:
            work(number)
        except Exception as e:
            failed.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def test_four_threads_patch_one_model():
    """At any time the model is patched by one of them or not at all, its hooks stay, and afterwards nothing is left."""
    model, calls = vggt.Vggt().eval(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    before, wins = traces(model), []

    def work(number):
        for _ in range(5):
            try:
                with gate4d.patch(model) as handle:
                    assert all(row.control is not None for row in handle.table)
                    assert all(m._forward_hooks for m in model.modules())
                wins.append(number)
            except RuntimeError as e:
                assert "patched already" in str(e)  # noqa: PT017
            gate4d.inspect(model)

    assert in_threads(4, work) == []
    assert wins
    assert traces(model) == before
    assert calls == []


def test_a_model_runs_while_another_thread_inspects_it():
    """The hooks of the model are never set aside: a forward in another thread sees all of them."""
    model, calls = vggt.Vggt().eval(), []
    attention = [m for m in model.modules() if isinstance(m, vggt.Attention)]
    for module in attention:
        module.k_norm.register_forward_hook(lambda *_: calls.append(1))

    def work(number):
        for _ in range(5):
            if number:
                gate4d.inspect(model)
            else:
                calls.clear()
                with torch.no_grad():
                    model(images())
                ran.append(len(calls))

    ran = []
    assert in_threads(2, work) == []
    assert len(set(ran)) == 1
    assert ran[0] > 0


@pytest.mark.parametrize("where", ["Handle", "adapter"])
def test_an_exception_while_patching_leaves_the_model_as_it_was(where, monkeypatch):
    model = vggt.Vggt()
    before = traces(model)

    def stop(self, *args):
        raise KeyboardInterrupt

    if where == "Handle":
        monkeypatch.setattr(gate4d.Handle, "__init__", stop)
    else:
        rows = gate4d.inspect(model).rows
        monkeypatch.setattr(rows[-1].adapter, "__init__", stop)
    with pytest.raises(KeyboardInterrupt):
        gate4d.patch(model)
    assert traces(model) == before
    monkeypatch.undo()
    gate4d.patch(model).remove()


def test_a_copy_for_a_trial_shares_nothing_but_what_it_is_told_to():
    attention = vggt.Attention(64, 4)
    attention.forward = base.PatchedAttention(attention)
    for share in (False, True):
        twin = base.detached_copy(attention, share=share)
        assert "forward" not in vars(twin)
        assert (twin.qkv.weight is attention.qkv.weight) == share
        assert twin.qkv is not attention.qkv
    assert "forward" in vars(attention)


CONTEXT = """
import torch, torch.distributed as dist, gate4d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from standins import vggt

dist.init_process_group("gloo", init_method="file://" + FILE, rank=0, world_size=1)
mesh, q, model = init_device_mesh("cpu", (1,)), torch.randn(1, 2, 16, 8), vggt.Vggt().eval()
images = torch.rand(1, 2, 3, 28, 42)
handle = gate4d.patch(model)
calls = (lambda: gate4d.gated_attention(q, q, q), lambda: model(images), lambda: gate4d.patch(vggt.Vggt()))
with context_parallel(mesh, buffers=[q], buffer_seq_dims=[2]):
    for call in calls:
        try:
            call()
        except RuntimeError as e:
            assert "context_parallel is active" in str(e), e
        else:
            raise AssertionError("not refused")
for call in calls:
    call()
torch.nn.functional.scaled_dot_product_attention = lambda *a, **k: None  # somebody else's: none of our business
gate4d.gated_attention(q, q, q)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_context_parallel_is_refused(tmp_path):
    pytest.importorskip("torch.distributed.tensor.experimental")
    script = f"FILE = {str(tmp_path / 'store')!r}" + CONTEXT
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=paths)
    assert done.returncode == 0, done.stderr[-2000:]


@torch.no_grad()
def test_what_attends_under_other_names_is_listed_with_its_reason():
    model, images = unknown.Half().eval(), torch.rand(2, 3, 3, 32, 48)
    expected = model(images)["out"]
    table = gate4d.inspect(model)
    assert table.unpatched == (
        "cross (CrossRope): it calls scaled_dot_product_attention",
        "crossvit (CrossVit): its own code takes a softmax and multiplies matrices, beside wq",
    )
    with pytest.warns(UserWarning, match=r"gate4d.patch: 2 modules attend .* cross \(CrossRope\)") as caught:
        handle = gate4d.patch(model)
    assert caught[0].filename == __file__
    with handle:
        assert "left alone: crossvit (CrossVit)" in str(handle.table)
        assert largest(model(images)["out"], expected) <= 1e-5
    for known in (vggt.Vggt(), croco.Ttt3r(), nn.TransformerEncoderLayer(8, 2)):
        assert gate4d.inspect(known).unpatched == ()


@torch.no_grad()
def test_rows_that_are_never_called_are_named():
    torch.manual_seed(0)
    model, views = unknown.Around().eval(), [{"img": torch.rand(1, 3, 32, 48)} for _ in range(2)]
    expected = leaves(model(*views))
    around = [f"{name}.{i}.cross_attn" for name in ("dec_blocks", "dec_blocks2") for i in range(2)]
    with pytest.warns(UserWarning, match="4 modules attend"):
        handle = gate4d.patch(model)
    blocks = [f"{n.removesuffix('.cross_attn')} (AroundBlock): its own code takes a softmax" for n in around]
    assert all(line.startswith(b) for line, b in zip(handle.table.unpatched, blocks, strict=True))
    assert handle.table.uncalled == []  # nothing ran yet
    for a, b in zip(leaves(model(*views)), expected, strict=True):
        assert largest(a, b) <= 1e-5
    assert [row.name for row in handle.table.uncalled] == around
    assert "never called so far, a gate there does nothing: dec_blocks.1.cross_attn" in str(handle.table)
    handle.__exit__(None, None, None)  # without a gate there is nothing to warn of
    with pytest.warns(UserWarning, match="4 modules attend"):
        handle = gate4d.patch(model)
    handle.table.select("decoder", "cross")[0].control.gate = lambda q, k: None
    model(*views)
    idle = r"gate4d.patch: a gate, .* on dec_blocks.0.cross_attn did nothing: .* goes around their forward"
    with pytest.warns(UserWarning, match=idle):
        handle.__exit__(None, None, None)
    assert handle.table.rows[0].control is None
