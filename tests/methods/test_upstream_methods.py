"""Methods beside their authors' code where ``GATE4D_UPSTREAM_<NAME>`` names checkouts; see ``upstream_methods.py``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NEEDS = {"EASI3R": ["EASI3R"], "TTT3R": ["TTT3R", "CUT3R"], "VGGT4D": ["VGGT4D"]}
EFFECTS = ("effect", "dynamic", "rates", "pairs", "refined_iou")  # shows that there was something to compare


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_same_as_the_authors(name):
    """Maps, states and predictions to rounding; the same clusters and, but for a pixel on a threshold, masks."""
    missing = [n for n in NEEDS[name] if f"GATE4D_UPSTREAM_{n}" not in os.environ]
    if missing:
        pytest.skip(f"{[f'GATE4D_UPSTREAM_{n}' for n in missing]} do not name checkouts")
    script = Path(__file__).parents[1] / "helpers" / "upstream_methods.py"
    done = subprocess.run([sys.executable, script, name], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    passes = {n: report.pop(n) for n in ("first", "second") if n in report}
    figures = report | {f"{key} ({n})": value for n, figures in passes.items() for key, value in figures.items()}
    compared = {k: v for k, v in figures.items() if not any(word in k for word in EFFECTS)}
    assert compared
    for key, value in compared.items():
        assert value <= (1e-3 if "differ" in key else 1e-4), (key, value)
    for key in (k for k in figures if k.startswith("effect")):
        assert figures[key] > 1e-2, key
    assert report.get("same_pairs", True)
