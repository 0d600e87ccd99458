"""Implementations in processes of their own: memory, limits, rounds, what is said when one stops."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gate4d.benchmarks.measure import processes, resident
from gate4d.benchmarks.measure.curves import Curve, Point, Study
from gate4d.benchmarks.measure.processes import Contestant, Limits
from gate4d.benchmarks.report import plots

HERE = "test_study:setup"
needs_mark = pytest.mark.skipif(not resident.reset_peak(), reason="the system cannot reset its high-water mark")


def setup(mib_per_frame: int = 0, add: float = 0.0, stream: bool = False, fail: str = ""):
    """Outputs [T, 3, 2] of ones; a run takes and frees scratch memory."""

    def run(frames):
        if fail and frames > 2:
            raise ValueError(fail)
        torch.ones(mib_per_frame * frames * resident.MIB // 4)
        out = torch.ones(frames, 3, 2) + add
        return out.split(1) if stream else [out[:0], out]

    return run


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(__import__("pathlib").Path(__file__).parent))


def test_extrapolation_follows_the_last_two_points():
    assert processes.extrapolate([], 8) == 0
    assert processes.extrapolate([(2, 3.0)], 4) == 12
    assert processes.extrapolate([(2, 3.0), (4, 6.0)], 8) == pytest.approx(12)
    assert processes.extrapolate([(2, 3.0), (4, 30.0)], 8) == pytest.approx(120)  # at most quadratic
    assert processes.extrapolate([(2, 3.0), (4, 2.0)], 8) == pytest.approx(4)  # at least linear
    assert processes.extrapolate([(2, 0), (4, 0)], 8) == 0


def test_frame_counts():
    assert processes.frame_counts(2) == [2]
    assert processes.frame_counts(5) == [2, 4, 5]
    assert processes.frame_counts(24) == [2, 4, 6, 8, 12, 16, 24]
    assert processes.frame_counts(100) == [2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]


def test_a_stopped_curve_leaves_its_time_to_the_others():
    curves = [Curve("a", spent=2.0), Curve("b", spent=3.0), Curve("c", spent=4.0, stopped="before 4 frames")]
    assert processes._seconds_left(curves[0], curves, 30.0) == pytest.approx((30 - 4) / 2 - 2)


def test_available_memory_is_plausible():
    assert 2**26 < resident.available_memory() < 2**46


METER = """
import torch
from gate4d.benchmarks.measure.resident import ResidentMeter
torch.zeros(2**20)
meter = ResidentMeter()
for mebibytes in (8, 64, 16):
    meter.start()
    torch.ones(mebibytes * 2**18)
    print(meter.growth())
"""


@needs_mark
def test_the_meter_measures_what_was_touched():
    run = subprocess.run([sys.executable, "-c", METER], capture_output=True, text=True, check=True)
    peaks = [int(x) / 2**20 for x in run.stdout.split()]
    for wanted, peak in zip((8, 64, 16), peaks, strict=True):
        assert wanted - 0.5 <= peak <= wanted + 3  # each core counts pages by itself and reports them in batches
    assert resident.ResidentMeter().method == resident.LINUX_METHOD


def test_without_a_mark_that_resets_growth_is_a_lower_bound(monkeypatch):
    marks = iter([100, 150, 150])
    monkeypatch.setattr(resident, "reset_peak", lambda: False)
    monkeypatch.setattr(resident, "_max_rss", lambda: next(marks))
    meter = resident.ResidentMeter()
    meter.start()
    assert meter.growth() == 50
    meter.start()  # the baseline stays
    assert meter.growth() == 50
    assert meter.method == resident.OTHER_METHOD


@needs_mark
def test_one_runs_out_of_memory_and_the_others_go_on(importable):
    contestants = [
        Contestant("hungry", HERE, {"mib_per_frame": 40}),
        Contestant("stream", HERE, {"mib_per_frame": 1, "stream": True, "add": 0.5}),
    ]
    shares, seen = [], []
    limits = Limits(max_bytes=200 * resident.MIB, repeat_seconds=0.01, max_rounds=2)

    def report(share, text):
        shares.append(share)

    result = processes.measure(contestants, [2, 4, 16], limits, report, lambda n, o: seen.append((n, sorted(o))))
    assert len(shares) > 6
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
    hungry, stream = result.curves
    assert [p.frames for p in hungry.points] == [2, 4]
    assert (hungry.ended, hungry.stopped_at) == ("memory", 16)
    assert hungry.stopped == "at 16 frames: out of memory, limit 0.195 GiB"
    assert [p.frames for p in stream.points] == [2, 4, 16]
    assert stream.stopped is None
    assert 80 * 0.98 <= hungry.points[0].peak_bytes / resident.MIB <= 83
    assert stream.points[-1].latency < stream.points[-1].seconds / 8
    assert seen == [(2, ["hungry", "stream"]), (4, ["hungry", "stream"]), (16, ["stream"])]
    assert result.differences[2] == pytest.approx(0.5)
    assert result.ratio("hungry", "stream", 2) > 0
    assert result.ratio("hungry", "stream", 16) is None
    assert result.tokens_per_frame == 3


def test_a_failure_that_is_not_memory_ends_the_study(importable):
    with pytest.raises(RuntimeError, match="bad failed at 4 frames: ValueError: no"):
        processes.measure([Contestant("bad", HERE, {"fail": "no"})], [2, 4], Limits())
    with pytest.raises(RuntimeError, match="odd did not start: TypeError"):
        processes.measure([Contestant("odd", HERE, {"nonsense": 1})], [2], Limits())

    def wrong(n, outputs):
        raise AssertionError("wrong result")

    with pytest.raises(AssertionError, match="wrong result"):
        processes.measure([Contestant("good", HERE, {})], [2], Limits(), verify=wrong)


class FakeWorker:
    """Answers with prepared messages, in place of a process."""

    name = "maps"

    def __init__(self, reply, limited=True):
        self.reply, self.limited, self.asked = reply, limited, []

    def ask(self, save=None, **request):
        self.asked.append(request)
        if isinstance(self.reply, Exception):
            raise self.reply
        reply = dict(self.reply)
        if save is not None and "output" in reply:
            np.save(save, reply.pop("output"))
        return reply


def advance(tmp_path, reply, limited=True, **changes):
    curve, outputs = Curve("maps", points=[Point(2, (1.0,), 2**30)]), {}
    limits = Limits(max_bytes=changes.get("max_bytes", 2**40))
    processes._advance(FakeWorker(reply, limited), curve, 4, limits, changes.get("left", 60.0), tmp_path, outputs)
    return curve, outputs


REPLY = {"seconds": 2.0, "latency": 0.5, "peak_bytes": 5, "wait": None}


def test_stopping_is_said(tmp_path):
    curve, outputs = advance(tmp_path, {**REPLY, "output": np.ones((4, 2))})
    assert curve.points[-1] == Point(4, (2.0,), 5, (0.5,))
    assert curve.spent == 2.0
    assert curve.stopped is None
    assert outputs["maps"].shape == (4, 2)
    late = advance(tmp_path, {}, left=1.2)[0]
    assert "about 8 s expected, 1 s" in late.stopped  # for two runs
    assert late.ended == "time"
    foreseen = advance(tmp_path, {}, limited=False, max_bytes=3 * 2**30)[0]  # where the system sets no limit
    assert "about 4.0 GiB expected, limit 3 GiB" in foreseen.stopped
    said = advance(tmp_path, {"out_of_memory": "can't allocate memory"}, max_bytes=3 * 2**30)[0]
    assert said.stopped == "at 4 frames: out of memory, limit 3 GiB"
    killed = processes.WorkerDied("killed by signal 9, most likely for lack of memory")
    assert advance(tmp_path, killed)[0].stopped == f"at 4 frames: {killed}"
    with pytest.raises(RuntimeError, match="maps failed at 4 frames: ValueError: no"):
        advance(tmp_path, processes.WorkerDied("ValueError: no"))
    with pytest.raises(RuntimeError, match="not finite at 4 frames"):
        advance(tmp_path, {**REPLY, "output": np.full((4, 2), np.nan)})


def repeated(limits, left=60.0, available=2**30, **contestants):
    """Rounds of fake workers by name, after a warm-up round; values are a worker and its first reply. Returns the
    curves."""
    at, curves = processes._Repeated(2, limits), []
    for name, (worker, first) in contestants.items():
        curves.append(Curve(name, [Point(2, (first["seconds"],), first["peak_bytes"], (first["latency"],))]))
        at.enter(worker, curves[-1], first)
    processes._repeat([at], left, available, lambda share, text: None)
    return curves


def test_short_counts_are_repeated_and_the_first_run_is_warm_up():
    waiting = FakeWorker({**REPLY, "seconds": 0.5, "wait": 0.01})
    entered = {
        "a": (waiting, {**REPLY, "seconds": 0.6, "peak_bytes": 9}),
        "b": (FakeWorker({**REPLY, "seconds": 0.25}), {**REPLY, "seconds": 0.15}),
    }
    slow, fast = repeated(Limits(repeat_seconds=1.6), **entered)
    assert slow.points == [Point(2, (0.5,) * 4, 9, (0.5,) * 4, 0.01)]  # memory is the first run's
    assert fast.points[0].times == (0.25,) * 4
    assert Study([2], [slow, fast]).ratio("a", "b", 2) == 2.0
    waiting.reply["wait"] = 0.5  # twice as many rounds, and none of them quiet: all count
    slow, _ = repeated(Limits(repeat_seconds=1.6), **entered)
    assert slow.points[0].runs == 8
    assert slow.points[0].wait == 0.5


@pytest.mark.parametrize(("left", "times"), [(60.0, (8.0, 8.0, 8.0)), (26.0, (8.0, 8.0)), (5.0, (8.0,))])
def test_long_counts_are_repeated_as_the_budget_allows(left, times):
    entered = FakeWorker({**REPLY, "seconds": 8.0}), {**REPLY, "seconds": 9.0}
    assert repeated(Limits(repeat_seconds=1.5), left, a=entered)[0].points[0].times == (8.0,)  # the warm-up round
    assert repeated(Limits(repeat_seconds=1.5, min_rounds=3), left, a=entered)[0].points[0].times == times


def test_what_slows_some_rounds_does_not_count():
    disturbed = Curve("a", [Point(2, (1.0, 9.0, 1.2, 5.0, 1.1), 7, (0.5, 0.4, 0.6, 3.0, 0.5))])
    even = Curve("b", [Point(2, (2.0, 2.3, 2.2), 7)])
    assert disturbed.points[0].seconds == pytest.approx(1.1)
    assert disturbed.points[0].latency == pytest.approx((0.4 + 0.5 + 0.5) / 3)
    assert Study([2], [disturbed, even]).ratio("a", "b", 2) == pytest.approx(1.1 / 2.1)


def test_calls_are_put_together_until_a_sample_lasts():
    quick, slow = (FakeWorker({**REPLY, "seconds": s}) for s in (0.01, 0.2))
    limits = Limits(repeat_seconds=1.0, sample_seconds=0.1)
    entered = {"a": (quick, {**REPLY, "seconds": 0.01}), "b": (slow, {**REPLY, "seconds": 0.2})}
    curves = repeated(limits, **entered)
    assert [request["calls"] for request in quick.asked] == [1, *[10] * 5]  # of max_rounds
    assert [request["calls"] for request in slow.asked] == [1] * 6
    assert curves[0].spent == pytest.approx(0.01 + 0.1 * 5)


@pytest.mark.parametrize("died", [False, True])
def test_out_of_memory_in_a_round_leaves_the_first_run(died):
    reply = processes.WorkerDied("killed by signal 9, for lack of memory") if died else {"out_of_memory": "no"}
    entered = {"a": (FakeWorker({**REPLY, "seconds": 1.0}), REPLY), "b": (FakeWorker(reply), REPLY)}
    curves = repeated(Limits(repeat_seconds=3.0), **entered)
    assert [c.points for c in curves] == [[Point(2, (1.0,) * 3, 5, (0.5,) * 3)], [Point(2, (2.0,), 5, (0.5,))]]
    assert len(entered["b"][0].asked) == 1
    broken = FakeWorker(processes.WorkerDied("ValueError: no"))
    with pytest.raises(RuntimeError, match="b failed at 2 frames: ValueError: no"):
        repeated(Limits(repeat_seconds=10.0), b=(broken, REPLY))


ORDER: list[str] = []


class StreamingWorker:
    """Three parts a run, as a process of a stream gives them."""

    def __init__(self, name):
        self.name, self.part = name, 0

    def ask(self, **request):
        assert ("turn" in request) == (self.part > 0)
        self.part = (self.part + 1) % 4
        ORDER.append(self.name)
        return {"more": True} if self.part else REPLY


def test_streams_take_turns_if_they_fit_side_by_side():
    ORDER.clear()
    limits = Limits(min_rounds=2)
    repeated(limits, **{name: (StreamingWorker(name), REPLY) for name in "abc"})
    assert "".join(ORDER) == "abcabcabcabc" * 2 + "cbacbacbacba"  # a warm-up round and two
    for available, together in ((46, True), (45, False)):  # three times 5 bytes each
        fakes = {name: (FakeWorker(REPLY), REPLY) for name in "abc"}
        repeated(limits, available=available, **fakes)
        assert all(request["together"] is together for worker, _ in fakes.values() for request in worker.asked)


def test_rounds_of_all_counts_are_spread(monkeypatch):
    order = []
    monkeypatch.setattr(processes._Repeated, "round", lambda self, *memory: order.append(self.frames))
    counts = [processes._Repeated(n, Limits(min_rounds=rounds)) for n, rounds in ((2, 4), (8, 2))]
    for at in counts:
        at.enter(FakeWorker(REPLY), Curve("a", [Point(at.frames, (2.0,), 5)]), REPLY)
    processes._repeat(counts, 60.0, 2**30, lambda share, text: None)
    assert order[:6] == [2, 8, 2, 2, 8, 2]


def test_a_killed_process_is_noticed(tmp_path, importable):
    worker = processes.Worker(Contestant("gate4d", HERE, {}), Limits(), tmp_path)
    worker._process.kill()
    with pytest.raises(processes.WorkerDied, match="killed by signal 9, most likely for lack of memory"):
        worker.ask(frames=2)
    worker.close()


def test_pictures_name_every_contestant_and_every_end(tmp_path):
    curves = [
        Curve("maps", [Point(2, (3.0,), 2**33)], "at 40 frames: out of memory", "memory", 40),
        Curve("SDPA + mask", [Point(2, (2.9,), 2**30)], "before 40 frames: about 9 s expected", "time", 40),
        Curve("gate4d", [Point(2, (2.0,), 2**20), Point(40, (10.0,), 2**21)]),
        Curve("FlexAttention", [], "at 2 frames: out of memory", "memory", 2),
    ]
    drawn = Study([2, 40], curves, {2: 1e-7}, 261, "measured", 2)
    plots.draw(tmp_path / "curves", drawn, "title", counted={"gate4d": [(2, 2**20), (40, 2**21)]})
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 5
    text = (tmp_path / "curves.svg").read_text()
    names = ("gate4d", "maps", "SDPA + mask", "FlexAttention")
    ends = ("out of memory at 40 frames", "time budget before 40 frames", "out of memory at 2 frames")
    for said in (*names, *(f"\N{MULTIPLICATION SIGN} {end}" for end in ends), "counted from shapes", "title"):
        assert f"{said} -->" in text
    assert "memory limit" not in text
    plots.draw(tmp_path / "again", drawn, "title", counted={"gate4d": [(2, 2**20), (40, 2**21)]})
    assert (tmp_path / "again.svg").read_text() == text
    plots.draw(tmp_path / "none", Study([2, 40], [curves[-1]]), "nobody fitted", limit=2**20)
    plots.draw(tmp_path / "limited", drawn, "title", limit=2**30)
    assert "memory limit" in (tmp_path / "limited.svg").read_text()
    assert json.loads(json.dumps(curves[2].points[1].as_dict()))["fps"] == 4.0
