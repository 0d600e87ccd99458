"""The benchmark's own logic: ratios, the correctness gate, measured memory, table, JSON, options."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from gate4d.benchmarks import check, inputs, peers
from gate4d.benchmarks.measure import memory, resident, rounds
from gate4d.benchmarks.measure.load import load
from gate4d.benchmarks.registry import SHAPES, AttentionShape
from gate4d.benchmarks.report import agreement, documents, result_files
from gate4d.benchmarks.rows import attention_rows, target
from gate4d.cli.main import main

TINY = target.Effort(
    "tiny", heads=2, frame_tokens=33, seconds=0.0, min_rounds=2, max_rounds=2, memory_tokens=(64, 96), memory_heads=1
)
CONDITIONS = target.Conditions(TINY, threads=1, backend="reference")
SHAPE = AttentionShape("test", 2, 16, 24, 24, 1, "tokens", 1, "tests")


def test_ratio_is_the_median_of_pairwise_ratios():
    # The machine is ten times slower in the last rounds: medians of each alone would compare different rounds.
    timed = rounds.Comparison({"a": [1.0, 2.0, 30.0], "b": [2.0, 4.0, 40.0]})
    assert timed.ratio("a", "b").median == 0.5
    assert timed.ratio("a", "b").spread == pytest.approx(0.0625)
    assert timed.difference("b", "a").median == 2.0
    assert timed.medians() == {"a": 2.0, "b": 4.0}


def test_variants_take_turns_after_a_warm_up_and_the_order_alternates(monkeypatch):
    monkeypatch.setattr(rounds, "waited", lambda: None)
    calls = []
    timed = rounds.compare(
        {name: lambda name=name: calls.append(name) for name in "ab"},
        seconds=0.0,
        threads=1,
        min_rounds=3,
        max_rounds=9,
    )
    warm = list("ab") * rounds.WARM_UP_ROUNDS
    assert calls == warm + list("ab") + list("ba") + list("ab")
    assert [len(t) for t in timed.times.values()] == [3, 3]


def test_rounds_stop_at_the_maximum_and_calls_are_averaged(monkeypatch):
    count = 0

    def step():
        nonlocal count
        count += 1

    monkeypatch.setattr(rounds, "waited", lambda: None)  # rounds that had to wait would be repeated
    timed = rounds.compare({"a": step}, seconds=60.0, threads=1, min_rounds=1, max_rounds=4, calls=5)
    assert len(timed.times["a"]) == 4
    assert count == 5 * (4 + rounds.WARM_UP_ROUNDS)
    with pytest.raises(ValueError, match="variants"):
        rounds.compare({}, seconds=0.0, threads=1)


def test_short_variants_are_called_more_often_a_sample(monkeypatch):
    monkeypatch.setattr(rounds, "waited", lambda: None)
    now, calls = 0.0, {"short": 0, "long": 0}

    def step(name, seconds):
        nonlocal now
        now, calls[name] = now + seconds, calls[name] + 1

    monkeypatch.setattr(rounds.time, "perf_counter", lambda: now)
    steps = {"short": lambda: step("short", 0.25), "long": lambda: step("long", 2.0)}
    timed = rounds.compare(steps, seconds=0.0, threads=1, min_rounds=3, sample_seconds=1.0)
    assert calls == {"short": rounds.WARM_UP_ROUNDS + 3 * 4, "long": rounds.WARM_UP_ROUNDS + 3}
    assert timed.medians() == {"short": 0.25, "long": 2.0}


def test_disturbed_rounds_do_not_count_if_there_are_enough_quiet_ones():
    times = {"a": [1.0, 9.0, 1.0, 1.0], "b": [2.0, 3.0, 2.0, 2.0]}
    quiet = rounds.Comparison(times, [0.0, 0.4, 0.01, 0.0])
    assert quiet.ratio("a", "b") == (0.5, 0.0)
    assert quiet.medians() == {"a": 1.0, "b": 2.0}
    assert quiet.warnings() == []
    busy = rounds.Comparison(times, [0.0, 0.4, 0.3, 0.2])
    assert busy.used("a") == times["a"]
    assert busy.warnings() == ["DISTURBED: threads waited 25% of the time for other processes"]


def test_drift_is_named():
    drifting = rounds.Comparison({"a": [1.0] * 3 + [1.2] * 3 + [1.5] * 3}).warnings()
    assert drifting == ["a drifted by +50% over the run"]


def test_waiting_for_the_processor_is_seen():
    if rounds.waited() is None:
        pytest.skip("the system does not tell how long threads wait")
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(2 * os.cpu_count())]
    try:
        time.sleep(0.3)
        step = {"a": lambda: sum(range(5 * 10**6))}  # longer than the system lets a process run at a stretch
        timed = rounds.compare(step, seconds=0.2, threads=1, min_rounds=4)
    finally:
        for process in others:
            process.kill()
            process.wait()
    assert timed.disturbed
    assert len(timed.waits) == len(timed.times["a"])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system places threads by itself")
def test_the_calling_thread_has_its_core_to_itself():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    before, seen = os.sched_getaffinity(0), []
    os.sched_setaffinity(thread.native_id, {max(before)})
    try:
        step = {"a": lambda: seen.append([os.sched_getaffinity(t) for t in (0, thread.native_id)])}
        rounds.compare(step, seconds=0, threads=1)
        assert os.sched_getaffinity(thread.native_id) == {max(before)}  # not what it was allowed at first
    finally:
        stop.set()
        thread.join()
    for own, others in seen[rounds.WARM_UP_ROUNDS :]:
        assert len(before) < 2 or (len(own) == 1 and others == before - own)
    assert os.sched_getaffinity(0) == before
    with rounds.own_core(len(before) + 1):  # more threads than cores
        assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [{"gate": "pairwise"}, {"gate": "drop"}, {"visible": "frame_causal", "window": 1}, {}])
def test_peers_agree_with_the_float64_reference(kind, dtype):
    x = inputs.make_inputs(SHAPE, 3, dtype=dtype, **kind)
    expected = check.expected_forward(x)
    for build in (peers.gate4d_forward, peers.sdpa_masked, peers.materialised):
        expected.verify(build.__name__, build(x)())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [{"gate": "pairwise"}, {"gate": "drop"}, {"visible": "frame_causal"}])
def test_a_variant_that_ignores_the_gate_or_the_mask_is_refused(kind, dtype):
    x = inputs.make_inputs(SHAPE, 3, dtype=dtype, **kind)
    with pytest.raises(check.WrongResult, match="plain: out is off by"):
        check.expected_forward(x).verify("plain", peers.sdpa(x)())


def test_one_wrong_tile_is_refused():
    x = inputs.make_inputs(SHAPE, 3, gate="pairwise")
    expected = check.expected_forward(x)
    (out,) = peers.gate4d_forward(x)()
    for begin in range(0, x.q.shape[2] - 16, 16):
        wrong = out.clone()
        wrong[0, 1, begin : begin + 16, 3] += 1e-3
        with pytest.raises(check.WrongResult, match="off by"):
            expected.verify("one tile", (wrong,))
    poisoned = out.clone()
    poisoned[0, 0, 5, 0] = torch.nan
    with pytest.raises(check.WrongResult, match="not finite"):
        expected.verify("poisoned", (poisoned,))
    with pytest.raises(check.WrongResult, match="2 results"):
        expected.verify("two", (out, out))


def test_gradients_and_statistics_are_checked():
    x = inputs.make_inputs(SHAPE, 2, gate="pairwise", requires_grad=True)
    grad_out = torch.randn_like(x.q)
    expected = check.expected_backward(x, grad_out)
    results = peers.with_backward(peers.gate4d_forward, x, grad_out)()
    expected.verify("gate4d", results)
    for i, name in enumerate(expected.names):
        changed = list(results)
        changed[i] = changed[i] * 1.01
        with pytest.raises(check.WrongResult, match=f"scaled: {name} is off"):
            expected.verify("scaled", changed)
    plain = x.ungated()
    check.expected_backward(plain, grad_out).verify("SDPA", peers.with_backward(peers.sdpa, plain, grad_out)())

    statistics = check.expected_forward(x, ("entropy", "sum_sq"))
    out, entropy, sum_sq = peers.gate4d_forward(x, row_stats=("entropy", "sum_sq"))()
    statistics.verify("gate4d", (out, entropy, sum_sq))
    with pytest.raises(check.WrongResult, match="entropy"):
        statistics.verify("swapped", (out, sum_sq, entropy))


def test_a_wrong_implementation_fails_its_row_and_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(attention_rows.peers, "gate4d_forward", lambda x, **_: peers.sdpa(x))
    monkeypatch.setattr(target, "QUICK", TINY)
    assert main(["bench", "--quick", "--only", "C1", "--threads", "1", "--backend", "reference"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "WrongResult: gate4d: out is off by" in out


def test_a_peer_that_fails_is_reported_and_the_row_goes_on(monkeypatch):
    def out_of_memory(x):
        raise MemoryError("no room\nfor the bias")

    monkeypatch.setattr(attention_rows.peers, "sdpa_masked", out_of_memory)
    (row,) = attention_rows.gated_forward_fp32(CONDITIONS)
    assert row.peers == {"SDPA + mask": "failed, MemoryError: no room"}
    assert row.ratio > 0


def test_every_row_is_measured_and_fits_80_columns(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(target, "QUICK", TINY)
    file = tmp_path / "results.json"
    chosen = "C1,C2,C4,C5,C6,C8,C12"  # C3 compiles and C7 starts processes: tested alone
    options = ["--only", chosen, "--threads", "1", "--backend", "reference", "--json", str(file)]
    assert main(["bench", "--quick", *options]) == 0  # a target missed is a result, not a failure
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines() if "--json" not in line and str(tmp_path) not in line)
    result = result_files.read(file)
    assert {"schema", "date", "command", "effort", "threads", "backend", "hardware", "versions", "rows"} <= set(result)
    assert result["threads"] == 1
    assert result["versions"]["torch"] == torch.__version__
    assert [row["id"] for row in result["rows"]] == ["C1", "C2", "C4", "C5", "C6", "C6", *["C8"] * 3, *["C12"] * 4]
    for row in result["rows"]:
        assert row["error"] is None
        assert row["passed"] is (row["ratio"] <= row["target"])
        assert row["times"].keys() == row["medians"].keys()
        assert all(len(times) >= 2 and min(times) > 0 for times in row["times"].values())
    assert result["rows"][0]["peers"]["SDPA + mask"] > 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same_bias():
    from torch.nn.attention.flex_attention import flex_attention  # eager: compiling takes longer than the whole suite

    x = inputs.make_inputs(SHAPE, 2, gate="pairwise")
    out = flex_attention(x.q, x.k, x.v, score_mod=peers.motion_score_mod(1 - x.motion_scores, x.motion_scores))
    check.expected_forward(x).verify("FlexAttention", (out,))


def scratch_step(scratch_mib: int, result_mib: int):
    """A setup for the memory test: holds 50 MiB; a call takes and frees scratch, then returns a result."""
    held = torch.ones(50 * resident.MIB // 4)

    def step(held=held):
        torch.ones(scratch_mib * resident.MIB // 4)
        return (torch.ones(result_mib * resident.MIB // 4),)

    return step


def test_memory_settles_where_gradients_are_off():
    with torch.no_grad():
        memory._settle()
        assert not torch.is_grad_enabled()


@pytest.mark.skipif(not resident.reset_peak(), reason="the system cannot reset its high-water mark")
def test_peak_memory_counts_scratch_and_not_the_result(monkeypatch):
    # In a process that has run other tests the allocator may give the result other free pages than the scratch had.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    found = memory.peak_growth("test_bench:scratch_step", threads=1, scratch_mib=40, result_mib=24)
    assert 15 <= found["extra_bytes"] / resident.MIB <= 18
    assert found["result_bytes"] == 24 * resident.MIB


def test_what_fresh_processes_are_told_to_run_exists():
    """A row names a function as text, which no import and no type checker follows when it moves."""
    sources = Path(attention_rows.__file__).parent.parent.rglob("*.py")
    named = {x for path in sources for x in re.findall(r"""["'](gate4d[\w.]*:\w+)["']""", path.read_text())}
    assert named
    for setup in named:
        assert callable(load(setup)), setup


def test_peak_memory_of_attention_in_a_fresh_process():
    shape = replace(SHAPE, queries=1024, keys=1024, special=0)
    arguments = {"implementation": "materialised", "shape": asdict(shape), "frames": 1}
    found = memory.peak_growth("gate4d.benchmarks.rows.attention_rows:attention_step", threads=1, **arguments)
    one_map = 2 * 1024**2 * 4
    assert found["extra_bytes"] >= one_map
    with pytest.raises(RuntimeError, match="no_such_step"):
        memory.peak_growth("gate4d.benchmarks.measure.memory:no_such_step", threads=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "C1,C99"], "--only must be names out of C1, .*C12, got C99"),
        (["--only", ","], "--only must be names"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--json", "no/such/folder/x.json"], "--json must be in an existing folder"),
        (["--backend", "magic"], "backend must be 'auto' or one of"),
        (["--into", "README.md"], "--into needs --markdown"),
        (["--against", "no-such-file.json"], "no-such-file.json"),
        (["peers", "--against", "README.md"], "--against is for targets, systems and sequences, got 'peers'"),
        (["--markdown", "no-such-file.json"], "no-such-file.json"),
    ],
)
def test_bad_options_end_with_a_sentence(options, message, capsys):
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)


def test_targets_are_listed_and_registered_once(capsys):
    assert main(["bench", "--only", "list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert [*("C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8"), "C12"] == [
        c for c in listed if c not in ("C9", "C10", "C11")
    ]
    with pytest.raises(ValueError, match="C1 is registered twice"):
        target.target("C1", "again")(attention_rows.gated_forward_fp32)


def _result(**changes):
    about = result_files.envelope("targets", 1) | {"effort": "tiny", **result_files.served_by("reference")}
    row = target.TargetRow("C1", "a | b", ratio=0.5, target=0.85, spread=0.01, medians={"x": 0.1}, times={"x": [0.1]})
    return json.loads(json.dumps({**about, "rows": [replace(row, **changes).as_dict()]}))


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [({}, "pass"), ({"ratio": 0.9}, "MISS"), ({"target": None}, ""), ({"ratio": None, "error": "E: x"}, "FAILED")],
)
def test_verdicts_in_table_and_markdown(changes, verdict):
    result = _result(**changes)
    assert documents.verdict(result["rows"][0]) == verdict
    assert any(line.startswith("C1 ") and line.endswith(verdict) for line in documents.table(result))
    assert f"| {verdict} |" in documents.markdown(result)


def test_markdown_is_written_between_markers(tmp_path, capsys):
    results, document = tmp_path / "r.json", tmp_path / "DOC.md"
    results.write_text(json.dumps(_result()))
    document.write_text("before\n<!-- begin: gate4d bench -->\nold\n<!-- end: gate4d bench -->\nafter\n")
    for _ in range(2):  # a second time changes nothing
        assert main(["bench", "--markdown", str(results), "--into", str(document)]) == 0
        text = document.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
        assert text.count("| C1 | a / b | 0.500 ± 0.010 | <= 0.850 | pass |") == 1
    document.write_text("no markers")
    assert main(["bench", "--markdown", str(results), "--into", str(document)]) == 2
    results.write_text("[1]")
    assert main(["bench", "--markdown", str(results)]) == 2
    assert "not a results file" in capsys.readouterr().err


def test_two_runs_are_compared_by_their_ratios(tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps(_result(peers={"SDPA + mask": 0.4, "maps": "failed, MemoryError: no"})))
    second.write_text(json.dumps(_result(ratio=0.54, peers={"SDPA + mask": 0.4}, medians={"x": 9.0})))
    assert main(["bench", "--markdown", str(second), "--against", str(first)]) == 0  # times do not count
    out = capsys.readouterr().out
    assert "2 ratios, 0 apart by more than 10%, the worst by 8.0%; 0 disturbed" in out
    assert max(map(len, out.splitlines())) <= 80
    assert main(["bench", "--markdown", str(second), "--against", str(first), "--tolerance", "0.05"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"C1 a \| b +0\.540 +0\.500 +8\.0%", out)
    assert "SDPA" not in out  # only what is apart is shown
    second.write_text(json.dumps(_result(ratio=0.4, note="DISTURBED: waited")))
    assert main(["bench", "--markdown", str(second), "--against", str(first)]) == 1
    assert re.search(r"C1 a \| b \(disturbed\) +0\.400 +0\.500 +25\.0%", capsys.readouterr().out)
    second.write_text(json.dumps(_result(unit="us")))
    assert main(["bench", "--markdown", str(second), "--against", str(first)]) == 2
    assert "no ratio in common" in capsys.readouterr().err


def test_memory_ratios_may_differ_by_what_the_counters_leave_open():
    peaks = {"plain": 20 * 2**20, "authors' way": 100 * 2**20}
    a, b = (
        agreement.figures(_result(ratio=r, times={}, peak_memory=peaks))["C1 a | b"] for r in (0.010, 0.019)
    )  # fmt: skip
    assert agreement.difference(a, b) == 0
    assert agreement.difference(a, replace(b, ratio=0.030)) == pytest.approx(1.0)
    timed = agreement.figures(_result(peak_memory=peaks))["C1 a | b"]
    assert timed.slack == 0


def test_registry_sizes():
    assert SHAPES["vggt.global"].sizes(4) == (1, 4164, 4164)
    assert SHAPES["vggt.frame"].sizes(4) == (4, 1041, 1041)
    assert SHAPES["streamvggt.cached"].sizes(20) == (1, 1041, 20820)
    assert SHAPES["cut3r.state_image"].sizes(9) == (1, 768, 577)
    assert SHAPES["vggt.global"].layout(3).patches_per_frame == 1036
    assert SHAPES["vggt_omega.camera_head"].sizes(10) == (1, 170, 170)
    for name, shape in SHAPES.items():
        assert name == shape.name
        assert re.match(r"[\w-]+/[\w-]+: [\w/]+\.py\b", shape.source), shape.source


def test_the_document_shows_the_committed_results():
    root = Path(__file__).parents[2]
    text = (root / "BENCHMARKS.md").read_text()
    shown = text.partition("<!-- begin: gate4d bench -->\n")[2].partition("<!-- end: gate4d bench -->")[0]
    files = sorted((root / "benchmarks" / "results").glob("cpu-*.json"))
    wanted = [documents.markdown(result_files.read(file)) for file in files] or ["Not measured yet.\n"]
    assert shown in wanted


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: b.update(cases=[1]), "cases must be a dict"),
        (lambda b: b.update(date=3), "date must be a str, got 3"),
        (lambda b: b.update(hardware=None), "hardware.processor must be a str"),
        (lambda b: b.update(versions={}), "versions.gate4d must be a str, got None"),
        (lambda b: b["cases"].update(x={"ratio": "fast"}), "the ratio of x must be a number > 0, got 'fast'"),
        (lambda b: b["cases"].update(x=[]), "the ratio of x must be a number"),
        (lambda b: b["cases"].update(x={"ratio": 0}), "the ratio of x must be a number > 0, got 0"),
    ],
)
def test_a_baseline_with_wrong_types_is_refused_before_anything_is_measured(
    change, match, tmp_path, monkeypatch, capsys
):
    from gate4d.benchmarks.suite import baseline

    monkeypatch.setattr(baseline, "run_suite", lambda *_: pytest.fail("it was measured"))
    stored = json.loads(baseline.STORED.read_text())
    change(stored)
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(stored))
    assert main(["bench", "suite", "--baseline", str(path)]) == 2
    assert match in capsys.readouterr().err


def test_results_nested_too_deeply_and_pipes_are_named(tmp_path, capsys):
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    os.mkfifo(tmp_path / "pipe")
    for path, match in ((deep, "nested too deeply"), (tmp_path / "pipe", "it is no file")):
        for command in (["bench", "--markdown"], ["eval", "--markdown"], ["bench", "suite", "--baseline"]):
            assert main([*command, str(path)]) == 2
            assert match in capsys.readouterr().err
