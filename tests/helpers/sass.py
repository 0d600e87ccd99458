"""Reads NVIDIA's machine code as text: what a thread executes in one turn of a kernel's main loop."""

from __future__ import annotations

import re
from collections import Counter

MATRIX = ("HGMMA", "HMMA", "UTCHMMA")


def hot_path(sass: str) -> Counter[str]:
    """Opcodes of one turn of the loop with the most matrix products, by name without modifiers.

    A conditional jump forward over code without matrix products, exponentials and asynchronous loads is taken: what it
    jumps over is a rare branch. Predicated instructions count.
    """
    code = [(int(a, 16), text) for a, text in re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(.*?);", sass, re.MULTILINE)]
    place = {address: i for i, (address, _) in enumerate(code)}

    def target(text: str) -> int | None:
        found = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        return int(found[1], 16) if found else None

    loops = [(to, at) for at, text in code if (to := target(text)) is not None and to < at]

    def worth(loop: tuple[int, int]) -> tuple[int, int]:
        products = sum(any(m in text for m in MATRIX) for at, text in code if loop[0] <= at <= loop[1])
        return products, loop[0] - loop[1]  # of loops with the same products the smallest

    first, last = max(loops, key=worth)
    counts: Counter[str] = Counter()
    i = place[first]
    while True:
        at, text = code[i]
        counts[re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]] += 1
        if at == last:
            return counts
        to = target(text)
        if to is not None and at < to <= last:
            skipped = [x for a, x in code if at < a < to]
            busy = any(word in x for x in skipped for word in (*MATRIX, "MUFU", "LDGSTS"))
            if not text.startswith("@") or not busy:
                i = place[to]
                continue
        i += 1
