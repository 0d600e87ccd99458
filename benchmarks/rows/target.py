"""What a measured target is: its rows, the conditions it is measured under, and the list that targets register in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from ..registry import SHAPES, AttentionShape


@dataclass
class TargetRow:
    """One line of the table.

    Attributes:
        id: the target's name, C1 to C12.
        what: what is compared with what.
        ratio: the measured figure; a time ratio unless ``unit`` says otherwise. None if the row failed.
        target: the figure that must not be exceeded; None for a line that only informs.
        unit: ``""`` for ratios, else the unit of ``ratio`` and ``target``.
        medians: seconds per call of each variant.
        times: raw seconds per call of each variant, round by round.
        waits: per round, the share of the threads' time spent waiting for other processes.
        spread: half the interquartile range of the ratio over the rounds.
        peers: this row's figure taken against other implementations: ratios, or a sentence for a peer that failed.
        peak_memory: measured bytes beyond inputs and outputs, by variant.
        note: sizes, what was left out, and what makes the figure less trustworthy.
        error: why the row failed.
        clocks: of the GPU when the row was measured.
    """

    id: str
    what: str
    ratio: float | None = None
    target: float | None = None
    unit: str = ""
    medians: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    waits: list[float] = field(default_factory=list)
    spread: float | None = None
    peers: dict[str, float | str] = field(default_factory=dict)
    peak_memory: dict[str, int | str] = field(default_factory=dict)
    note: str = ""
    error: str | None = None
    clocks: str = ""

    @property
    def passed(self) -> bool | None:
        """None where there is nothing to pass: no target, or a failed row."""
        if self.ratio is None or self.target is None:
            return None
        return self.ratio <= self.target

    def as_dict(self) -> dict:
        """For JSON, ``passed`` included."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Effort:
    """How much is measured. Sizes are the targets' own except where a field lowers them.

    Attributes:
        name: shown in the output.
        heads: heads used at most; None for the model's own number.
        frame_tokens: tokens of a frame at most; None for the model's own number (only tests lower it).
        seconds, min_rounds, max_rounds: per comparison.
        sample_seconds: calls of a variant are put together until a sample lasts this long.
        memory_tokens: the token counts at which peak memory is measured.
        memory_heads: heads there; few, so that long sequences stay quick.
    """

    name: str
    heads: int | None
    frame_tokens: int | None
    seconds: float
    min_rounds: int
    max_rounds: int
    memory_tokens: tuple[int, ...]
    memory_heads: int
    sample_seconds: float = 0.0


FULL = Effort("full", None, None, 20.0, 7, 31, (4096, 16384, 65536), 2, 0.05)
QUICK = Effort("quick", 4, None, 2.0, 5, 15, (4096, 16384), 2, 0.05)


@dataclass(frozen=True)
class Conditions:
    """Handed to every target: effort, threads, backend, and where progress goes."""

    effort: Effort = FULL
    threads: int = 1
    backend: str = "auto"
    report: Callable[[str], None] = lambda text: None

    def shape(self, name: str) -> AttentionShape:
        """A shape of the registry, cut down to the effort."""
        shape, effort = SHAPES[name], self.effort
        if effort.frame_tokens is not None:
            tokens = min(effort.frame_tokens, shape.keys)
            shape = replace(shape, queries=min(tokens, shape.queries), keys=tokens, special=min(1, shape.special))
        return replace(shape, heads=min(shape.heads, effort.heads or shape.heads))


Measure = Callable[[Conditions], list[TargetRow]]


@dataclass(frozen=True)
class Target:
    """A registered target: ``measure(conditions)`` gives its rows."""

    id: str
    what: str
    measure: Measure


TARGETS: dict[str, Target] = {}


def target(id: str, what: str) -> Callable[[Measure], Measure]:
    """Register a function as target ``id``; ``what`` is its line in the list of targets."""

    def register(measure: Measure) -> Measure:
        if id in TARGETS:
            raise ValueError(f"target {id} is registered twice.")
        TARGETS[id] = Target(id, what, measure)
        return measure

    return register


def one_line(e: BaseException) -> str:
    """The exception's name and the first line of its text, cut where torch's lists of backends would begin."""
    text = str(e).strip().partition("\n")[0]
    return f"{type(e).__name__}: {text if len(text) <= 300 else text[:300] + ' ...'}"
