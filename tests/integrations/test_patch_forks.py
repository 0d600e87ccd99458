"""Forks of TTT3R read more of its attention maps than their means, and compute the same when patched."""

import copy
import pickle

import pytest
import torch
from standins import croco, forks
from torch import nn

import gate4d
from gate4d.integrations.maps import DeferredMap, whole_map

WHOLE = ("recal3r", "memix", "ttsa3r")  # what is read in these kinds is more than means


def build(fork, kind=None):
    torch.manual_seed(0)
    model = fork().eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(1.5)
    model.config.model_update_type = kind or model.kinds[-1]
    return model


def leaves(x):
    return [t for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, torch.Tensor)]


def assert_same(got, expected, limit=1e-5):
    got, expected = leaves(got), leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() <= limit * b.abs().max()


def kinds(fork):
    return ["ttsa3r"] if fork is forks.Ttsa3r else list(fork.kinds)


CASES = [(fork, kind) for fork in forks.FORKS for kind in kinds(fork)]


@pytest.mark.parametrize(("fork", "kind"), CASES)
@torch.no_grad()
def test_outputs_equal(fork, kind):
    model, clip = build(fork, kind), forks.views(5)
    loops = [model, lambda v: model.forward_recurrent_lighter(v, device="cpu")]
    expected = [run(clip) for run in loops]
    with gate4d.patch(model) as handle:
        for run, e in zip(loops, expected, strict=True):
            assert_same(run(clip), e)
        assert not handle.table.unpatched
        assert all(row.tokens is not None for row in handle.table)
        text = str(handle.table)
        assert ("attention maps are given whole" in text) == (kind in WHOLE)
        assert ("_forward_impl reads more of them than their mean" in text) == (kind in WHOLE)
    assert all(torch.equal(a, b) for a, b in zip(leaves(model(clip)), leaves(expected[0]), strict=True))


@torch.no_grad()
def test_reading_whole_maps_matters():
    """The outputs of every fork depend on more than the means, so that the tests above could fail."""
    for fork in (forks.ReCal3r, forks.Ttsa3r, forks.Memix):
        model, clip = build(fork), forks.views(4)
        expected = leaves(model(clip))
        rate = model.rate
        model.rate = lambda maps, *rest, rate=rate: rate([m.mean(-1, keepdim=True).expand_as(m) for m in maps], *rest)
        pairs = zip(leaves(model(clip)), expected, strict=True)
        assert max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs) > 1e-4


@pytest.mark.parametrize("fork", [forks.ReCal3r, forks.Memix, forks.Filt3r])
@torch.no_grad()
def test_a_setting_changed_after_the_patch(fork):
    """What is read depends on the configuration, which users set at any time."""
    model, clip = build(fork, "cut3r"), forks.views(4)
    expected = {}
    for kind in fork.kinds:
        model.config.model_update_type = kind
        expected[kind] = model(clip)
    model.config.model_update_type = "ttt3r"
    with gate4d.patch(model) as handle:
        for kind in (*fork.kinds, *reversed(fork.kinds)):
            model.config.model_update_type = kind
            assert_same(model(clip), expected[kind])
            assert (handle.table.reader.reason is not None) == (kind in WHOLE)


@torch.no_grad()
def test_means_where_they_are_enough_and_only_what_is_read_elsewhere(monkeypatch):
    made = []
    new = DeferredMap.__new__
    monkeypatch.setattr(DeferredMap, "__new__", staticmethod(lambda cls, *a: made.append(new(cls, *a)) or made[-1]))
    model, clip = build(forks.Ttt3rSteps), forks.views(3)
    with gate4d.patch(model):
        made.clear()  # of the trial runs
        model(clip)
        assert made == []
    model = build(forks.ReCal3r)
    with gate4d.patch(model):
        made.clear()
        model(clip)
    # 2 layers of state and image decoder, self and cross; read are the state's cross maps of frames 1 and 2.
    assert len(made) == 3 * 8
    assert sum(m.computed for m in made) == 2 * 2


@torch.no_grad()
def test_a_fork_whose_loops_cannot_be_tried_keeps_whole_maps():
    class Unknown(forks.ReCal3r):
        def _forward_impl(self, views, ret_state=False, *, temperature):
            return super()._forward_impl(views, ret_state)

        def other_loop(self, batch_of_my_own):
            return self._recurrent_rollout(*batch_of_my_own, return_attn=True)

        def forward(self, views):
            return self._forward_impl(views, temperature=1)[0]

    model, clip = build(Unknown, "recal3r"), forks.views(4)
    expected = model(clip)
    with gate4d.patch(model) as handle:
        assert_same(model(clip), expected)
        assert "other_loop could not be tried: TypeError: it takes batch_of_my_own" in str(handle.table)
    part = build(forks.Ttt3rSteps).dec_blocks_state  # without the loops
    with gate4d.patch(part) as handle:
        assert "ModuleList has no loop over views" in str(handle.table)
        x, pos = torch.rand(1, 10, 96), torch.zeros(1, 10, 2, dtype=torch.long)
        assert part[0].attn(x, pos, return_attn=True)[1].shape == (1, 2, 10, 10)


@torch.no_grad()
def test_state_that_the_loops_keep_is_no_setting():
    """A counter of frames does not make the loops be tried again at every frame; a setting changed for ever ends it."""

    class Counts(forks.Ttt3rSteps):
        frames, last = 0, None

        def start(self):
            self.before = None

        def rate(self, maps, new, old, feat):
            self.before = new
            self.frames, self.last = self.frames + 1, float(new.mean())
            return super().rate(maps, new, old, feat)

    model, clip = build(Counts), forks.views(4)
    with gate4d.patch(model) as handle:
        reader = handle.table.reader
        for _ in range(3):
            model(clip)
        assert reader.reason is None
        assert reader._trials == 1
        expected = model(clip)
        for temperature in range(20):
            model.temperature = temperature
            assert_same(model(clip), expected)
        assert reader.reason == "settings of the model change again and again"
        assert reader._trials < 20


@torch.no_grad()
def test_what_a_loop_keeps_for_later_counts_as_read():
    class Keeps(forks.Ttt3rSteps):
        def rate(self, maps, new, old, feat):
            self.seen = maps[0]  # for a picture
            return super().rate(maps, new, old, feat)

    model = build(Keeps)
    with gate4d.patch(model) as handle:
        model(forks.views(2))
        assert "reads more of them" in str(handle.table)
        assert model.seen.shape[-1] == 7  # pose token and 6 patches


@torch.no_grad()
def test_trial_leaves_no_trace():
    model, calls = build(forks.ReCal3r), []
    model(forks.views(3))
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    before = {n: {k: id(v) for k, v in vars(m).items()} for n, m in model.named_modules()}
    state, pressure = torch.get_rng_state(), model.pressure.clone()
    gate4d.inspect(model)
    assert calls == []
    assert before == {n: {k: id(v) for k, v in vars(m).items()} for n, m in model.named_modules()}
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.pressure, pressure)


@torch.no_grad()
def test_copies_know_their_own_settings():
    model, clip = build(forks.ReCal3r, "ttt3r"), forks.views(4)
    with gate4d.patch(model):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        part = copy.deepcopy(model.dec_blocks_state)
    for other in copies:
        other.config.model_update_type = "recal3r"
        got = other(clip)
        assert_same(got, build(forks.ReCal3r, "recal3r")(clip))
        row = gate4d.inspect(other).select("state", "cross")[0]
        assert row.control.reader.owner is other
    assert part[0].attn.forward.reader is None  # and it does not drag the model along


def test_gradients_through_whole_maps():
    model, clip = build(forks.ReCal3r), forks.views(3)

    def gradient():
        model.zero_grad()
        sum(x.sin().sum() for x in leaves(model(clip))).backward()
        return model.decoder_embed.weight.grad.clone()

    expected = gradient()
    with gate4d.patch(model):
        assert_same(gradient(), expected, 1e-4)


@pytest.mark.parametrize("fork", forks.FORKS)
def test_method_ttt3r_is_refused_with_its_reason(fork):
    model = build(fork)
    with pytest.raises(
        ValueError, match="method 'ttt3r' is for plain CUT3R, found TTT3R's own fork, whose loop updates"
    ):
        gate4d.patch(model, method="ttt3r")
    assert not any("forward" in m.__dict__ for m in model.modules())


@torch.no_grad()
def test_a_deferred_map_is_a_tensor():
    q, k = torch.rand(1, 2, 5, 8), torch.rand(1, 2, 7, 8)
    expected = whole_map(q, k, 0.5)

    def fresh():
        return DeferredMap(q, k, 0.5)

    assert isinstance(fresh(), torch.Tensor)
    assert (fresh().shape, fresh().dtype, fresh().device) == (expected.shape, expected.dtype, expected.device)
    for read in (
        lambda x: x + 1,
        lambda x: 2 * x,
        lambda x: x.mean((1, 3)),
        lambda x: x[:, :, 1:],
        lambda x: torch.cat([x, x]),
        lambda x: torch.stack((x, x)).sum(),
        lambda x: torch.einsum("bhnm->bmn", x),
        lambda x: x.permute(3, 0, 1, 2).reshape(7, -1),
        lambda x: x.detach().clone().softmax(-1),
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: torch.tensor(x.tolist()),
        lambda x: x.cpu().float(),
        lambda x: copy.deepcopy(x),
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: nn.functional.max_pool2d(x, 2),
    ):
        got = read(fresh())
        assert not isinstance(got, DeferredMap) or got is not None
        assert torch.equal(got, read(expected))
    deferred = fresh()
    assert not deferred.computed
    assert repr(deferred) == repr(expected)
    assert deferred.computed
    with torch.enable_grad():
        assert type(DeferredMap(q, k, 0.5)) is torch.Tensor


def test_plain_ttt3r_stand_in_still_reduces():
    model = croco.Ttt3r().eval()
    assert gate4d.inspect(model).reader.reason is None
