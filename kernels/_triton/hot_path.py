"""The hot path of a kernel in NVIDIA machine code: one turn of the main loop on a tile without boundary."""

from __future__ import annotations

import re

_MATRIX = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA)\b")
_WORK = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|MUFU|LDGSTS|UTMALDG)\b")
_BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")


def hot_path(sass: str) -> list[str]:
    """The instructions, in order, of the innermost loop with the most matrix instructions; of equal ones the shortest.

    A forward branch is taken where it passes over neither matrix instructions, exponentials nor asynchronous loads:
    it leaves out the mask of a boundary tile. A mask that the compiler made into selects stays counted. Empty
    for a kernel without such a loop.
    """
    code = [(int(a, 16), text) for a, text in re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(.*?);", sass, re.MULTILINE)]
    loops = [(start, end) for end, text in code if (start := _target(text)) is not None and start < end]
    if not loops:
        return []

    matrix = {loop: sum(bool(_MATRIX.search(x)) for at, x in code if loop[0] <= at <= loop[1]) for loop in loops}

    def innermost(loop: tuple[int, int]) -> bool:
        """A wait that failed jumps back from the end of the kernel: that is a loop around loops."""
        return not any(matrix[x] for x in loops if x != loop and loop[0] <= x[0] and x[1] <= loop[1])

    start, end = max(filter(innermost, loops), key=lambda loop: (matrix[loop], loop[0] - loop[1]))
    body = [(at, text) for at, text in code if start <= at <= end]
    path, skip_to = [], start
    for at, text in body:
        if at < skip_to:
            continue
        path.append(text)
        target = _target(text)
        if target is not None and at < target <= end:
            passed = [x for a, x in body if at < a < target]
            if not text.startswith("@") or not any(_WORK.search(x) for x in passed):
                skip_to = target
    return path


def _target(text: str) -> int | None:
    """The address that a branch goes to."""
    found = _BRANCH.search(text)
    return int(found[1], 16) if found else None
