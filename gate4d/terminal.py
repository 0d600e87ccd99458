"""What commands show on a terminal: tables in at most 80 columns, and how far something has come."""

from __future__ import annotations

import contextlib
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

WIDTH = 80
# show(text, done=..., total=..., advance=..., passing=...): each of them may be left out
Show = Callable[..., None]


def table(columns: str, rows: Iterable[Sequence[object] | str | None]) -> list[str]:
    """Lines of a table.

    Args:
        columns: alignment and width of each column as in format strings, such as ``"<4 >9 ^12"``.
        rows: cells, of which there may be fewer than columns; a string is a line as it is, None a rule.
    """
    specs = columns.split()
    width = sum(int(spec[1:]) for spec in specs)
    lines = []
    for row in rows:
        if row is None or isinstance(row, str):
            lines.append("-" * width if row is None else row)
        else:
            lines.append("".join(f"{cell!s:{spec}}" for cell, spec in zip(row, specs, strict=False)).rstrip())
    return lines


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]], columns: str = "") -> list[str]:
    """The same in Markdown; ``columns`` has ``<`` or ``>`` for each column, left alone where it is empty."""
    rule = "".join("---:|" if side == ">" else "---|" for side in columns or "<" * len(head))
    lines = [_markdown_row(head), f"|{rule}"]
    return lines + [_markdown_row(row) for row in rows]


def wrapped(text: str, first: str = "", then: str = "") -> list[str]:
    """Lines of at most :data:`WIDTH` columns, the first with ``first`` before it and the others with ``then``."""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=then)


def field(name: str, value: str, width: int = 11) -> list[str]:
    """A named value; what does not fit into the line goes on below the value's beginning."""
    return wrapped(value, f"{name:<{width}}", " " * width) or [name]


@contextlib.contextmanager
def progress(text: str | None = None, total: int | None = None, done: int = 0) -> Iterator[Show]:
    """How far something has come: a bar where stderr is a terminal and rich is installed, else a line on stderr
    whenever the text is a new one.

    Yields ``show(text=None, *, done=None, total=None, advance=0, passing=False)``. ``total`` None stands for an unknown
    one; a text that is ``passing``, such as the number of a round, is shown in the bar alone.
    """
    console = _console()
    if console is None:
        yield _lines(total, done, text)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text or "starting", total=total, completed=done)

        def show(
            text: str | None = None,
            *,
            done: int | None = None,
            total: int | None = None,
            advance: int = 0,
            passing: bool = False,
        ) -> None:
            changed = {"description": None if text is None else text[:40], "completed": done, "total": total}
            bar.update(task, advance=advance, **{name: x for name, x in changed.items() if x is not None})

        yield show


def _lines(total: int | None, done: int, first: str | None) -> Show:
    shown: set[str] = set()
    now = {"total": total, "done": done}

    def show(
        text: str | None = None,
        *,
        done: int | None = None,
        total: int | None = None,
        advance: int = 0,
        passing: bool = False,
    ) -> None:
        now["total"] = now["total"] if total is None else total
        now["done"] = (now["done"] if done is None else done) + advance
        if text is None or passing or text in shown:
            return
        shown.add(text)
        counted = f"[{min(now['done'] + 1, now['total'])}/{now['total']}] " if now["total"] else ""
        print(f"{counted}{text}", file=sys.stderr, flush=True)

    show(first)
    return show


def _console():
    """rich's console on stderr, or None where rich is missing or stderr is no terminal."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    return console if console.is_terminal else None


def _markdown_row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"
