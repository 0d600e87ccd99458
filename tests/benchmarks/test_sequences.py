"""Backbones under every method, counted memory, predictions, tables; peers by operation; the stored baseline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import require_backend

from gate4d.benchmarks import peers, registry
from gate4d.benchmarks.check import WrongResult, expected_forward
from gate4d.benchmarks.measure.curves import Curve, Point, Study
from gate4d.benchmarks.report import agreement, plots, result_files, sequence_tables
from gate4d.benchmarks.rows import catalogue, peer_rows, target
from gate4d.benchmarks.sequences import backbone_curves, backbones, counted, predictions
from gate4d.benchmarks.sequences.contestants import SEQUENCES, case_of
from gate4d.benchmarks.suite import baseline
from gate4d.cli.main import main

TINY = target.Effort(
    "tiny", heads=2, frame_tokens=33, seconds=0.0, min_rounds=2, max_rounds=2, memory_tokens=(64,), memory_heads=1
)
FRAMES = 4


def outputs(backbone, dtype="float32", **case):
    with torch.inference_mode():
        scale = 4 if backbone == "recurrent" else 16  # 12 and 16 heads make one width
        run = backbones.setup(backbone, dtype, **{"frames": FRAMES, "scale": scale, **case})
        return torch.cat(list(run(FRAMES))).double()


@pytest.mark.parametrize("name", SEQUENCES)
def test_methods_agree_and_the_gate_matters(name):
    exact = {g: outputs(name, "float64", method="maps", gated=g) for g in (True, False)}
    assert torch.isfinite(exact[True]).all()
    assert (exact[True] - exact[False]).abs().max() > 1e-3 * exact[True].abs().max()
    for contestant in SEQUENCES[name].contestants:
        case = case_of(contestant)
        if case["method"] == "FlexAttention" or case["window"]:
            continue  # compiled: only in the benchmark itself; window: below
        truth = exact[case["gated"]]
        allowed = 2 * (outputs(name, method="maps", gated=case["gated"]) - truth).abs().max()
        rounding = torch.finfo(torch.float32).eps * truth.abs().max() * truth[..., 0].numel() ** 0.5
        assert (outputs(name, **case) - truth).abs().max() <= allowed + rounding, contestant


def test_a_window_bounds_the_cache(monkeypatch):
    monkeypatch.setattr(backbones, "ANCHORS", 1)
    full = outputs("streaming", "float64", method="maps")
    windowed = outputs("streaming", "float64", method="maps", window=2)
    assert torch.equal(full[:3], windowed[:3])  # anchor and two frames
    assert not torch.equal(full[3], windowed[3])
    ours = outputs("streaming", method="gate4d", window=2)
    assert (ours - windowed).abs().max() < 1e-5 * windowed.abs().max()


def test_a_wrong_backbone_is_refused():
    right = outputs("recurrent", method="gate4d", frames=8).numpy()
    plain = outputs("recurrent", method="SDPA", gated=False, frames=8).numpy()
    verify = backbone_curves._verify
    verify("recurrent", (FRAMES, 8), FRAMES, {"gate4d": right, "SDPA": plain})
    with pytest.raises(WrongResult, match=r"recurrent, gate4d: outputs are off by"):
        verify("recurrent", (FRAMES, 8), FRAMES, {"gate4d": plain})
    with pytest.raises(WrongResult, match="maps: outputs at 8 frames differ"):
        verify("recurrent", (FRAMES, 8), 8, {"gate4d": right, "maps": right + 0.1})


def test_counted_bytes_by_hand():
    def make():
        x = torch.zeros(256, 4)  # an input: not counted

        def run(frames):
            y = x + 1  # 4 KiB
            z = y.repeat(frames, 1)  # frames x 4 KiB
            del y
            view = z.view(-1)  # no memory of its own
            yield (view * 2)[:4]  # twice frames x 4 KiB at the peak

        return run

    assert counted.counted(make, 3) == 2 * 3 * 4096
    assert counted.counted(make, 1) == 2 * 4096


def test_memory_models_grow_as_the_methods_do():
    require_backend("cpu")
    models = {m: counted.memory_model("alternating", method=m, scale=16) for m in ("gate4d", "SDPA + mask", "maps")}
    tokens = registry.SHAPES["vggt.global"].scaled(16)
    for name, bias in (("gate4d", 0), ("SDPA + mask", 1), ("maps", 1 + tokens.heads)):
        small, large = models[name](8), models[name](32)
        held = bias * (32 * tokens.queries) ** 2 * 4  # the bias, and at least one map a head
        assert (large > held) if bias else (large <= 4.1 * small)
    stream = counted.memory_model("streaming", method="SDPA", gated=False, scale=16)
    a_frame = 2 * tokens.queries * tokens.width * 4  # k and v of the layer that sees the clip
    assert stream(1001) - stream(1000) >= a_frame


def test_time_model_and_its_error():
    points = [(n, 0.5 * n + 0.01 * n * n) for n in (2, 4, 8, 16)]
    model = predictions.TimeModel.fit(points)
    assert (model.linear, model.quadratic) == (pytest.approx(0.5), pytest.approx(0.01))
    assert model.seconds(1000) == pytest.approx(10500)
    assert predictions.last_point_error(points) == pytest.approx(0, abs=1e-9)
    assert predictions.TimeModel.fit(points[:2]) is None
    assert predictions.last_point_error(points[:3]) is None
    falling = predictions.TimeModel.fit([(n, n - 0.001 * n * n) for n in (2, 4, 8, 16)])
    assert falling.quadratic == 0
    straight = predictions.TimeModel.fit([(n, 3 + 2 * n) for n in (2, 4, 8)], "linear")
    assert straight.seconds(1000) == pytest.approx(2003)
    rising = predictions.TimeModel.fit([(n, n * n - 0.5 * n) for n in (2, 4, 8, 16)])
    assert rising.linear == 0


def test_predictions_for_gpus():
    one, eight = (next(s for s in predictions.sharded() if (s.frames, s.gpus) == (1000, g)) for g in (1, 8))
    assert one.seconds == pytest.approx(8 * eight.seconds)
    gathered = 2 * 1000 * 1041 * 1024 * 2
    assert eight.bytes_per_gpu > gathered
    assert one.bytes_per_gpu > 3 * eight.bytes_per_gpu
    tokens, width = 1041 * 10, 1024
    linear, attention = 48 * 24 * width**2 * tokens, 24 * 4 * width * (1041 * tokens + tokens**2)
    assert predictions.vggt_operations(10) == linear + attention


@pytest.fixture
def found():
    def curve(name, stop=None):
        points = [Point(n, (0.1 * n, 0.11 * n), n << 20, (0.1,)) for n in (2, 4, 8)]
        c = Curve(name, points[: stop or 3])
        if stop:
            c.stop(8, "memory", "at 8 frames: out of memory, limit 2.0 GiB")
        return c

    study = Study([2, 4, 8], [curve("gate4d"), curve("maps", 2), curve("SDPA")], {2: 1e-7}, 145, "measured", 2)
    return study, backbone_curves.as_dict(SEQUENCES["recurrent"], study)


def test_tables_markdown_and_pictures(found, tmp_path, monkeypatch):
    _, data = found
    assert data["time_ratios"]["maps"] == {"2": 1.0, "4": 1.0}
    lines = [*sequence_tables.backbone_table("recurrent", data), *sequence_tables.prediction_table({"recurrent": data})]
    assert max(map(len, [*lines, *sequence_tables.gpu_table()])) <= 80
    assert "maps stopped at 8 frames: out of memory, limit 2.0 GiB." in lines
    assert any(line.startswith("PREDICTED, not measured") for line in lines)
    about = result_files.envelope("sequences", 2) | {"effort": "quick", **result_files.served_by("auto")}
    result = {**about, "backbones": {"recurrent": data}, "max_bytes": 2 << 30, "pictures": ["s-recurrent"]}
    (tmp_path / "s.json").write_text(json.dumps(result))
    document = tmp_path / "DOC.md"
    document.write_text("<!-- begin: gate4d bench sequences -->\n<!-- end: gate4d bench sequences -->\n")
    assert main(["bench", "--markdown", str(tmp_path / "s.json"), "--into", str(document)]) == 0
    assert "| 8 | 100.0; 8 | - | 100.0; 8 |" in document.read_text()
    assert "![recurrent](benchmarks/results/s-recurrent.png)" in document.read_text()
    monkeypatch.setattr(plots, "draw_predictions", lambda path: None)
    names = backbone_curves.draw(tmp_path, "s", {"recurrent": found}, "subtitle", 2 << 30)
    assert names == ["s-recurrent"]
    assert "out of memory at 8 frames" in (tmp_path / "s-recurrent.svg").read_text()


def test_two_runs_of_sequences_are_compared(found):
    _, data = found
    before = {"kind": "sequences", "backbones": {"recurrent": data}, **ABOUT, "effort": "quick", "threads": 1}
    now = json.loads(json.dumps(before))
    assert agreement.compare(now, before)[1]
    now["backbones"]["recurrent"]["time_ratios"]["SDPA"]["8"] *= 1.2
    now["threads"] = 2
    lines, agree = agreement.compare(now, before)
    assert not agree
    assert "note: the number of threads differs: 2 and 1" in lines
    assert any(line.startswith("recurrent, gate4d / SDPA, 8 frames") and line.endswith("20.0%") for line in lines)
    assert lines[-1].startswith("5 ratios, 1 apart by more than 10%")


def test_a_backbone_that_fails_is_reported_and_the_run_goes_on(found, monkeypatch, tmp_path, capsys):
    def measure(sequence, counts, limits, progress):
        progress(0.5, "2 frames, gate4d")
        if sequence.name == "streaming":
            raise WrongResult("streaming, gate4d: outputs are off by 1, allowed are 0.")
        return found[0]

    monkeypatch.setattr(backbone_curves, "measure", measure)
    file = tmp_path / "s.json"
    options = ["--quick", "--only", "recurrent,streaming", "--memory", "0.25", "--json", str(file)]
    assert main(["bench", "sequences", *options]) == 1
    out = capsys.readouterr().out
    assert "streaming: FAILED, WrongResult: streaming, gate4d: outputs are off by 1" in out
    assert all(len(line) <= 80 for line in out.splitlines() if str(tmp_path) not in line and "command" not in line)
    data = json.loads(file.read_text())
    assert list(data["backbones"]) == ["recurrent"]
    assert data["max_bytes"] == 2**28
    assert data["backbones"]["recurrent"]["counts"] == [2, 4, 8]
    assert data["hardware"]["processor"]
    assert (tmp_path / "s-recurrent.png").exists()


# ---- peers


@pytest.mark.parametrize("operation", ["plain", "keys", "drop", "window", "backward"])
def test_peers_compute_an_operation(operation, monkeypatch):
    few = {n: p for n, p in peers.PEERS.items() if n != "FlexAttention"}  # compiling takes longer than the suite
    monkeypatch.setattr(peers, "PEERS", few)
    row, costs = peer_rows.measure(operation, target.Conditions(TINY, 1, "reference"), frames=2)
    able = [p.name for p in few.values() if operation in p.operations and p.package is None]
    assert set(costs) == {"gate4d", *able}
    assert all(isinstance(r, float) for r in row.peers.values())
    assert any("flash-attn cannot run: flash_attn is not installed" in line for line in peer_rows.missing(operation))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("case", "queries"),
    [
        ({"gate": "keys"}, 24),
        ({"gate": "drop"}, 24),
        ({"visible": "frame_causal", "window": 1}, 24),
        ({"gate": "keys"}, 40),  # more queries than keys: scores of queries were read past their end
        ({"gate": "drop"}, 40),
    ],
)
def test_flex_attention_with_masks(case, queries):
    from torch.nn.attention.flex_attention import flex_attention

    from gate4d.benchmarks.inputs import make_inputs

    x = make_inputs(registry.AttentionShape("t", 2, 16, queries, 24, 1, "tokens", 1, "t"), 3, **case)
    score_mod, block_mask = peers.flex_mods(x)
    out = flex_attention(x.q, x.k, x.v, score_mod=score_mod, block_mask=block_mask)
    expected_forward(x).verify("FlexAttention", (out,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "WHAT must be one of targets, systems, sequences, peers, suite, got 'nothing'"),
        (["peers", "--operation", "magic"], "operation must be one of plain, gated, .*got 'magic'"),
        (["peers", "--shape", "gpt.layer"], "shape must be one of vggt.patch_embed, .*got 'gpt.layer'"),
        (["peers", "--operation", "saliency"], "measure it with `gate4d bench --only C10`"),
        (["peers", "--operation", "window", "--shape", "cut3r.state"], "shape whose tokens grow"),
        (["peers", "--shape", "cut3r.state_image"], "as many queries as keys"),
        (["peers", "--frames", "0"], "--frames must be at least 1"),
        (["sequences", "--memory", "0"], r"--memory must be more than 0 \(GiB a process\), got 0"),
        (["sequences", "--only", "spiral"], "--only must be names out of alternating, pairwise"),
        (["suite", "--tolerance", "-1"], "--tolerance must be 0 or more"),
        (["suite", "--baseline", "no-such.json"], "no-such.json"),
    ],
)
def test_bad_input_is_one_sentence(options, message, capsys):
    import re

    assert main(["bench", *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_everything_is_listed(capsys):
    assert main(["bench", "peers", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*registry.OPERATIONS, *registry.SHAPES, *peers.PEERS))
    assert main(["bench", "sequences", "--only", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in SEQUENCES)


def test_operations_name_known_shapes_targets_and_peers():
    targets = catalogue.load_targets()
    for o in registry.OPERATIONS.values():
        assert o.shape in registry.SHAPES
        assert all(t in targets for t in o.targets if t.startswith("C"))
    for p in peers.PEERS.values():
        assert set(p.operations) <= set(registry.OPERATIONS)
        assert p.reasons("nothing of this name")[-1]


# ---- baseline


ABOUT = {"hardware": {"processor": "A", "capability": "AVX2"}, "versions": {"gate4d": "0"}, "date": "2026-01-01T"}


def case(ratio, spread=0.01):
    return {"ratio": ratio, "spread": spread, "seconds": 1.0, "peer_seconds": 1.0 / ratio, "rounds": 7}


def test_regressions_are_ratios_beyond_tolerance_and_spread():
    stored = {**ABOUT, "cases": {"a": case(0.5), "b": case(0.5), "c": case(0.5), "gone": case(1.0)}}
    now = {"a": case(0.57), "b": case(0.6), "c": case(0.6, 0.05), "d": case(2.0)}
    lines, worse = baseline.compare(now, stored, ABOUT, 0.15)
    assert worse
    verdicts = {line.split()[0]: line.split()[-1] for line in lines if line[:2] in ("a ", "b ", "c ", "d ")}
    assert verdicts == {"a": "ok", "b": "20%", "c": "ok", "d": "new"}
    assert "not run: gone" in lines
    assert not any("other hardware" in line for line in lines)
    assert not baseline.compare({"a": case(0.4)}, stored, ABOUT, 0.15)[1]


def test_a_baseline_from_other_hardware_is_said():
    elsewhere = {"processor": "B", "capability": "AVX512"}
    stored = {**ABOUT, "hardware": elsewhere, "cases": {"a": case(0.5)}}
    lines, worse = baseline.compare({"a": case(0.5)}, stored, ABOUT, 0.15)
    assert not worse
    assert any("from other hardware (B, AVX512)" in line for line in lines)
    assert any("ratios alone count" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_suite_exit_status(monkeypatch, tmp_path, capsys):
    stored = tmp_path / "base.json"
    monkeypatch.setattr(baseline, "run_suite", lambda threads, only: ({"a": case(0.5)}, 0))
    assert main(["bench", "suite", "--save", str(stored)]) == 0
    assert main(["bench", "suite", "--baseline", str(stored)]) == 0
    monkeypatch.setattr(baseline, "run_suite", lambda threads, only: ({"a": case(0.7)}, 0))
    assert main(["bench", "suite", "--baseline", str(stored)]) == 1
    assert "REGRESSED by 40%" in capsys.readouterr().out
    monkeypatch.setattr(baseline, "run_suite", lambda threads, only: ({}, 5))
    assert main(["bench", "suite", "--baseline", str(stored)]) == 1
    stored.write_text("[]")
    assert main(["bench", "suite", "--baseline", str(stored)]) == 2


def test_the_suite_runs_under_pytest_benchmark(monkeypatch):
    pytest.importorskip("pytest_benchmark")
    monkeypatch.setenv("PYTEST_ADDOPTS", "")
    found, status = baseline.run_suite(1, "recurrent")
    assert status == 0
    (measured,) = found.values()
    assert measured["ratio"] > 0
    assert np.isfinite(measured["spread"])


def test_the_document_shows_the_committed_results():
    require_backend("cpu")  # predictions count what it holds
    root = Path(__file__).parents[2]
    text = (root / "BENCHMARKS.md").read_text()
    edges = "<!-- begin: gate4d bench sequences -->\n", "<!-- end: gate4d bench sequences -->"
    shown = text.partition(edges[0])[2].partition(edges[1])[0]
    (file,) = (root / "benchmarks" / "results").glob("sequences-cpu-*.json")
    result = result_files.read(file)
    assert shown == sequence_tables.markdown(result)
    for picture in result["pictures"]:
        assert all((file.parent / f"{picture}.{kind}").exists() for kind in ("png", "svg"))
