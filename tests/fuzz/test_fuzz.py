"""A short slice of the fuzzing, the same every time; and that the harness finds what is wrong, and nothing else."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.torch_attention import torch_attention

import gate4d

from . import __main__ as runner
from .cases import Case, draw, random_case
from .check import STATS, Attend, Failure, check
from .shrink import shrink, simpler, snippet

SLICE = 48


@pytest.mark.parametrize("first", range(0, SLICE, 8))
def test_slice(first, compiled):
    for seed in range(first, first + 8):
        case = random_case(seed, runner.BACKENDS)
        try:
            check(case)
        except Failure as e:
            raise AssertionError(f"{e}\n{case.code()}") from None


@pytest.fixture
def compiled():
    if gate4d.kernels.support.library_error() is not None:
        pytest.skip("the compiled library is missing")


def plain(seed: int) -> Case:
    """Without NaN, of a size in which one wrong key shows."""
    case = random_case(seed)
    sizes = {name: min(getattr(case, name), 60) + 3 for name in ("queries", "keys", "dim", "value_dim")}
    settings = {"poison": "none", "infinite": False, "dtype": "float32", "scale": 0.0, "values": "normal"}
    return replace(case, magnitude=min(case.magnitude, 30.0), **sizes, **settings)


def found(cases: Iterable[Case], attend: Attend) -> Failure | None:
    """The first failure."""
    for case in cases:
        try:
            check(case, attend)
        except Failure as failure:
            return failure
    return None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_passes(dtype):
    """Attention in torch at that precision stays within the allowed distances, with sums in any order."""

    def attend(q, k, v, *, scale, row_stats, return_aux, backend, **options):
        return torch_attention(q, k, v, running=True, **options)

    cases = [replace(plain(seed), dtype=dtype, backend="reference") for seed in range(25)]
    assert found((c for c in cases if c.strength < 20), attend) is None  # its weights underflow beyond


def last_key_lost(q, k, v, **options):
    return gate4d.gated_attention(q, torch.cat((k[:, :, :-1], k[:, :, -1:] * 0 - 1), 2), v, **options)


def gate_ignored(q, k, v, gate=None, **options):
    return gate4d.gated_attention(q, k, v, **options)


def off_by_one(q, k, v, visible=None, **options):
    if visible is not None and visible.bounds is not None:
        start, end, sink = visible.bounds.unbind(1)
        visible = gate4d.Visibility.intervals(start, (end + 1).clamp(max=k.shape[2]), sink)
    return gate4d.gated_attention(q, k, v, visible=visible, **options)


def changed(name, factor, q, k, v, **options):
    out, aux = gate4d.gated_attention(q, k, v, **options)
    if name == "out":
        return out * factor, aux
    return out, aux._replace(**{name: getattr(aux, name) * factor})


class Detour(torch.autograd.Function):
    """The identity, with a gradient that is a little wrong."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-3)


def wrong_gradient(q, k, v, **options):
    return gate4d.gated_attention(q, Detour.apply(k), v, **options)


def unsettled(q, k, v, **options):
    out, aux = gate4d.gated_attention(q, k, v, **options)
    return out * (1 + 1e-7 * torch.rand(())), aux


MUTANTS = {
    "last key": last_key_lost,
    "gate": gate_ignored,
    "interval": off_by_one,
    "gradient": wrong_gradient,
    "run to run": unsettled,
    **{name: partial(changed, name, 1 + 1e-3) for name in ("out", "lse", *STATS)},
}


@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_wrong_is_found(name, compiled):
    assert found((replace(plain(seed), strength=1.0) for seed in range(0, 64, 8)), MUTANTS[name]) is not None


def leaky(q, k, v, **options):
    """A mask that multiplies by 0 where it should leave out."""
    out, aux = gate4d.gated_attention(q, k, v, **options)
    return out + 0 * v.sum((2, 3))[:, :, None, None].to(out), aux


def blind(q, k, v, **options):
    out, aux = gate4d.gated_attention(q, k.nan_to_num(), v.nan_to_num(), **options)
    return out.nan_to_num(), aux


@pytest.mark.parametrize("attend", [leaky, blind])
def test_nan_in_the_wrong_place_is_found(attend, compiled):
    case = Case(poison="hidden_v" if attend is leaky else "k", visible="frame_causal", frames=3, window=1, keys=60)
    failure = found((replace(case, seed=seed) for seed in range(20)), attend)
    assert failure is not None
    assert failure.kind == ("out is not finite" if attend is leaky else "out hides NaN")


def test_a_case_is_the_same_wherever_it_is_drawn():
    for seed in range(20):
        assert random_case(seed) == random_case(seed)
        case = eval(random_case(seed).code())
        a, b = draw(case), draw(random_case(seed))
        for x, y in zip(a.tensors.values(), b.tensors.values(), strict=True):
            assert torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0))


def test_failures_are_shrunk_and_printed_as_code():
    case = random_case(3)
    case = replace(case, queries=90, keys=77, dim=33, batch=2)
    smallest = shrink(case, lambda c: c.queries > 4 and c.dim > 2)
    assert smallest == replace(Case(seed=case.seed), queries=5, dim=3)
    assert all(c != case for c in simpler(case))
    smallest = Case(seed=5, queries=2, keys=3, visible="packed", frames=2, gate="general", poison="k")
    text = snippet(smallest, "avx2", "out")
    python = text.split("# or, in Python, without the oracle:")[1]
    scope: dict = {}
    exec(python.replace("print(", "result = (").replace("backend='cpu'", "backend='reference'"), scope)
    x = draw(smallest)
    assert torch.equal(scope["k"].nan_to_num(-7.0), x.tensors["k"].nan_to_num(-7.0))
    assert scope["out"].shape == x.grad_out.shape


@pytest.mark.parametrize(("status", "result"), [(-15, "no result"), (-9, "no result"), (-11, "CRASH of case 4")])
def test_a_worker_that_ends_is_a_crash_only_if_nobody_ended_it(status, result, monkeypatch, capsys):
    def ended(command, **_):
        if "--worker" not in command:  # a trial of shrinking
            return subprocess.CompletedProcess(command, 0)
        done = int(command[command.index("--seed") + 1]) == 5  # the worker after the crash
        report = {"seed": 4, "cases": 4, "seconds": 1.0, "failures": 0, "ratios": {}, "done": done}
        Path(command[command.index("--worker") + 1]).write_text(json.dumps(report))
        return subprocess.CompletedProcess(command, 0 if done else status)

    monkeypatch.setattr(runner.subprocess, "run", ended)
    if status == -11:
        assert runner.parent("avx2", 0, 9, 1.0)["failures"] == 1
        assert result in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match=result):
            runner.parent("avx2", 0, 9, 1.0)
