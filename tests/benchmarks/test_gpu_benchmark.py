"""Planning and resuming of the GPU measurements, with a fake clock and timer; no GPU is used."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gate4d.benchmarks.gpu.__main__ as command
from gate4d.benchmarks.gpu import precompile, tuning
from gate4d.benchmarks.gpu.__main__ import main, plan, table
from gate4d.benchmarks.gpu.attention_works import _received
from gate4d.benchmarks.gpu.slices import measure, measured, run
from gate4d.benchmarks.gpu.work import TINY, Work
from gate4d.benchmarks.measure import gpu
from gate4d.benchmarks.report import result_files
from gate4d.benchmarks.rows.target import TargetRow
from gate4d.kernels._triton import configurations
from gate4d.kernels.support import TileShape


class Clock:
    """Time that only passes while something is measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def works(*seconds: float) -> list[Work]:
    return [Work(f"W{i}", 1.0, lambda: ({}, {}, lambda: None), s) for i, s in enumerate(seconds)]


def row(work: Work) -> list[TargetRow]:
    return [TargetRow(work.id, "", 0.5, 1.0, medians={"ours": 1.0, "peer": 2.0}, note="ours / peer")]


def about() -> dict:
    return result_files.envelope("gpu", 1, command="a test")


def measured_by(clock: Clock, seen: list[str]):
    def step(work: Work) -> list[TargetRow]:
        clock.now += work.seconds
        seen.append(work.id)
        return row(work)

    return step


def test_slices_resume_until_everything_is_measured(tmp_path: Path) -> None:
    out, todo, seen = tmp_path / "r.json", works(40, 40, 10, 50), []
    clock = Clock()
    options = {"measure": measured_by(clock, seen), "clock": clock, "about": about}
    run(todo, out, 1.0, resume=False, **options)
    assert seen == ["W0", "W2"]  # 40 s and what still fits a minute
    assert [r["id"] for r in result_files.read(out, "gpu")["rows"]] == ["W0", "W2"]
    run(todo, out, 1.0, resume=True, **options)
    result = run(todo, out, 1.0, resume=True, **options)
    assert seen == ["W0", "W2", "W1", "W3"]
    assert len(result["slices"]) == 3
    run(todo, out, 1.0, resume=False, **options)
    assert seen[4:] == ["W0", "W2"]  # without --resume it starts again


def test_a_failure_is_kept_apart_and_tried_again(tmp_path: Path) -> None:
    out, todo = tmp_path / "r.json", works(1, 1)

    def fails(work: Work) -> list[TargetRow]:
        if work.id == "W0":
            raise RuntimeError("wrong result")
        return row(work)

    result = run(todo, out, 1.0, resume=False, measure=fails, clock=Clock(), about=about)
    assert [r["error"] for r in result["rows"]] == ["RuntimeError: wrong result", None]
    shown = table([*todo, *works(1, 1, 1)[2:]], result)
    assert "FAILED" in shown
    assert "RuntimeError: wrong result" in shown
    assert "0.500" in shown
    assert "not measured yet: W2" in shown
    assert max(map(len, shown.splitlines())) <= 80
    result = run(todo, out, 1.0, resume=True, measure=row, clock=Clock(), about=about)
    assert [r["error"] for r in result["rows"]] == [None, None]
    assert measured(result) == {"W0", "W1"}


def test_measure_checks_first_and_divides_by_the_fastest_peer() -> None:
    calls: list[str] = []
    seconds = {"ours": iter((3.0, 2.0, 2.5, 2.5, 2.5)), "best": iter([1.0] * 5), "slow": iter([9.0] * 5),
               "fast": iter([2.0] * 5)}  # fmt: skip

    def step(name: str):
        return lambda: calls.append(name)

    def timer(step) -> float:
        step()
        if calls[-1] == "broken":
            raise RuntimeError("no kernel")
        return next(seconds[calls[-1]])

    ours = {"ours": step("ours"), "best": step("best")}
    peers = {"slow": step("slow"), "broken": step("broken"), "fast": step("fast")}
    (found,) = measure(Work("W what", 1.0, lambda: (ours, peers, lambda: calls.append("check"))), timer)
    assert calls[:6] == ["check", "ours", "best", "slow", "broken", "fast"]
    assert calls[6:10] == ["fast", "slow", "best", "ours"]  # in turns, in the other order, without the broken one
    assert (found.id, found.what, found.ratio) == ("W", "what", 1.25)  # the default, though another of ours is faster
    assert found.note.startswith("ours / fast; best of ours: best, 0.500")
    assert found.peers == {"slow": pytest.approx(2.5 / 9), "fast": 1.25, "broken": "failed, no kernel"}
    assert found.times["ours"] == [3.0, 2.0, 2.5, 2.5, 2.5]

    def wrong() -> None:
        raise AssertionError("relative error 1")

    timed = len(calls)
    with pytest.raises(AssertionError, match="relative error"):
        measure(Work("W", 1.0, lambda: ({"ours": step("ours")}, {}, wrong)), timer)
    assert len(calls) == timed  # nothing was timed


def test_plan_has_unique_ids_that_fit_a_slice() -> None:
    ids = [w.id for w in plan()]
    assert len(set(ids)) == len(ids)
    assert {i.split()[0] for i in ids} == {*(f"G{n}" for n in range(1, 11)), "T1"}
    assert max(w.seconds for w in plan()) < 9 * 60


def test_limits_are_the_targets() -> None:
    """As design/targets.md has them: G3 by head dimension, G8 for both passes together."""
    limits = {w.id: w.limit for w in plan()}
    assert limits["G3 gate on / off, D=64"] == 1.15
    assert limits["G3 gate on / off, D=128"] == 1.03
    assert limits["G3 row statistics on / off"] == 1.20
    assert {limit for name, limit in limits.items() if name.startswith("G8")} == {2.05}
    assert [limits[f"G4 backward{kind}"] for kind in ("", " with gate gradients")] == [1.1, 1.2]
    assert limits["G6 frame-causal, 64 frames"] == 0.56


def test_each_pass_of_vggt4d_is_a_row() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    (work,) = [w for w in plan(TINY) if w.id.startswith("G8")]
    both, *extra = measure(work, _timed)
    assert [(row.what.rpartition(", ")[2], row.target) for row in extra] == [("pass 1", 1.03), ("pass 2", 1.03)]
    took = sum(row.medians["pass"] for row in extra)
    assert 0.3 * both.medians["vggt4d"] < took <= 1.5 * both.medians["vggt4d"]


def test_no_round_begins_after_the_time_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def timer(step) -> float:
        now[0] += 10
        return 1.0

    timed, _ = gpu.compare({"a": print, "b": print}, rounds=5, timer=timer, seconds=25)
    assert {name: len(t) for name, t in timed.times.items()} == {"a": 2, "b": 2}


def test_tests_that_fail_are_a_row_and_the_measuring_goes_on(tmp_path: Path, monkeypatch) -> None:
    """The whole command on a fake device: tests, targets, tile shapes, the rest of the tests, the table of tiles."""
    (tmp_path / "smoke.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    (tmp_path / "rest.py").write_text("def test_c(): pass\n")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "SMOKE", ("smoke.py",))
    monkeypatch.setattr(command, "REST", ("rest.py",))
    out = tmp_path / "deep" / "r.json"
    only = ["--dry-run", "--out", str(out), "--minutes", "5", "--only", "G3", "T1"]
    assert main(only) == 1
    rows = {f"{r['id']} {r['what']}": r for r in result_files.read(out, "gpu")["rows"]}
    assert next(iter(rows)) == "T0 tests, 20 first"
    assert "1 failed" in rows["T0 tests, 20 first"]["error"]
    assert "test_b" in rows["T0 tests, 20 first"]["error"]
    assert list(rows)[1] == "T0 compiled ahead"
    assert "0 failed" in rows["T0 compiled ahead"]["note"]
    assert list(rows)[-1] == "T0 tests, the rest"
    assert rows["T0 tests, the rest"]["error"] is None
    assert "1 passed" in rows["T0 tests, the rest"]["note"]
    tuned = [r for name, r in rows.items() if name.startswith("T1")]
    assert len(tuned) == 8
    assert all(r["error"] is None and len(r["medians"]) > 3 for r in tuned)
    assert sum(name.startswith("G3") for name in rows) == 3
    assert "tuned" in result_files.read(out, "gpu")
    assert main([*only, "--resume"]) == 1  # the failure is still in the file


def test_what_is_compiled_ahead_is_every_variant_of_ours() -> None:
    """In shares that together are the whole plan; one that fails does not stop the others."""
    once = precompile.share(TINY, 0, 1)
    assert once == precompile.share(TINY, 0, 2) + precompile.share(TINY, 1, 2)
    tiles = 2 * sum(map(len, tuning.TILES.values()))
    assert once > tiles + 20
    assert precompile.share(replace(TINY, kernel="none"), 0, 1) < once
    sizes = [n // precompile.UNIT for n in (16384, 32768, 65536, 131072)]
    assert all(n % 16 == 0 for n in sizes)  # the same specialisations as the full sizes


def test_compiling_ahead_ends_in_time() -> None:
    wait = precompile.start(1, dry=True)
    row = wait(0.0)
    assert "1 ended early, 0 failed" in row.note


def test_a_table_of_tiles_is_made_of_what_is_faster() -> None:
    def row(what: str, **medians: float) -> dict:
        return TargetRow("T1", f"tiles of {what}", medians=medians).as_dict()

    tile = "block_m=128 block_n=64 num_warps=8 num_stages=3"
    rows = [row("forward, D=64", table=1.1, **{tile: 1.0}), row("received, D=64", table=1.01, **{tile: 1.0}),
            row("grad_key, D=64", table=1.0)]  # fmt: skip
    (found,) = tuning.tuned({"rows": rows})
    assert (found["pass"], found["width"], found["dtype"]) == ("forward", 64, "bfloat16")
    assert found["features"] == ["gate"]
    assert found["config"] == {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3, "registers": 0,
                               "descriptors": False}  # fmt: skip


def test_a_tile_shape_that_is_wrong_is_recorded_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    step, check = tuning._step(TINY, "forward", 16384)
    bad = tuning.TILES["forward"][0]

    def wrong() -> None:
        if configurations._override.get("forward") == TileShape(*bad):
            raise AssertionError("relative error 1")
        check()

    monkeypatch.setattr(tuning, "_step", lambda *args: (step, wrong))
    (work,) = [w for w in tuning.plan(TINY) if w.id.startswith("T1 tiles of forward")][:1]
    (found,) = measure(work, _timed)
    assert tuning._name(bad) not in found.medians
    assert "relative error 1" in found.peers[tuning._name(bad)]


@pytest.mark.parametrize("work", [w for w in plan(TINY) if "N=32768 /" not in w.id], ids=lambda w: w.id)
def test_dry_run_on_a_cpu(work: Work) -> None:
    """Every measurement at a tiny size: it is built, its check passes, and all that was asked for is timed."""
    if work.id.startswith("G8"):
        pytest.importorskip("sklearn")
        pytest.importorskip("skimage")
    found, *_ = measure(work, _timed)
    assert found.medians
    assert found.ratio > 0
    failed = {name for name, said in found.peers.items() if isinstance(said, str)}
    assert failed <= {"SDPA cudnn", "SDPA efficient", "SDPA flash"}


def _timed(step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


@pytest.mark.parametrize("broken", ["q", "k", "v", "motion"])
def test_the_backward_check_sees_a_wrong_gradient(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is 1 % off in one row of 32 is found before anything is timed."""
    (work,) = [w for w in plan(TINY) if w.id == "G4 backward with gate gradients"]
    grad = torch.autograd.grad

    def wrong(outputs, inputs, *args, **kwargs):
        grads = list(grad(outputs, inputs, *args, **kwargs))
        if inputs[0].dtype == torch.float32:  # not the reference's
            index = ("q", "k", "v", "motion").index(broken)
            grads[index] = grads[index].contiguous()
            flat = grads[index].view(-1, grads[index].shape[-1])
            flat[flat.norm(dim=1).argmax()] *= 1.01
        return grads

    _, _, check = work.build()
    monkeypatch.setattr(torch.autograd, "grad", wrong)
    with pytest.raises(AssertionError, match=f"gradient of {broken}: relative error"):
        check()


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "G5"]) == 0
    assert capsys.readouterr().out.count("G5") == 3
    for bad in (["--minutes", "0"], ["--only", "G99"]):
        with pytest.raises(SystemExit) as stopped:
            main(bad)
        assert stopped.value.code == 2
    assert "there are G1 to G10" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_a_peer_for_the_attention_received_computes_the_mean_per_key(monkeypatch) -> None:
    """With a stand-in of flash-colreduce's signature: (query, key, reduction, is_causal=False, scale=None)."""

    def colreduce(query, key, reduction, is_causal=False, scale=None):
        p = torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1)
        return {"sum": p.sum(2), "mean": p.mean(2)}[reduction]

    monkeypatch.setitem(sys.modules, "flash_colreduce", SimpleNamespace(flash_colreduce=colreduce))
    ours, others, check = _received(TINY, 32768, "flash-colreduce")
    check()
    (mean,) = others["flash-colreduce"]()
    torch.testing.assert_close(mean, ours["default"]().mean.to(mean.dtype))
    wrong = SimpleNamespace(flash_colreduce=lambda *qk, reduction: 1.1 * colreduce(*qk, reduction))
    monkeypatch.setitem(sys.modules, "flash_colreduce", wrong)
    _, _, check = _received(TINY, 32768, "flash-colreduce")
    with pytest.raises(AssertionError, match="the mean of flash-colreduce: relative error"):
        check()
    wrong.__spec__ = ModuleSpec("flash_colreduce", None)  # installed
    planned = [[w.id for w in plan(replace(TINY, device=device)) if "colreduce" in w.id] for device in ("cpu", "cuda")]
    assert planned == [[], ["G7 received, given lse / flash-colreduce"]]
