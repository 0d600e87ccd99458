"""``gate4d tune``: tile shapes of the Triton kernels, measured in turns on the GPU at hand; the fastest are kept."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from gate4d.terminal import wrapped

EPILOG = """\
Nothing is tuned unless this command runs. Every shape is checked against the default one's result before it is timed.
What is at least 2 percent faster goes into a table that later calls read: $GATE4D_TUNED, or tuned.json in the cache
directory. It counts only with the Triton version and the kernels that it was measured with; `gate4d info` says whether
one is in use. It has not run on a GPU yet.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=9.0, help="time for it all (default 9)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table (default: where later calls read it)")
    parser.add_argument("--dry-run", action="store_true", help="every step at tiny sizes on the CPU; needs --out")


def run(args: argparse.Namespace) -> int:
    """0: a table was written; 1: a shape of the default table failed, or time was too short for any."""
    import torch

    from gate4d.benchmarks.gpu import tuning
    from gate4d.benchmarks.gpu.slices import run as measure
    from gate4d.benchmarks.gpu.work import FULL, TINY
    from gate4d.kernels.support import tile_tables

    if not args.minutes > 0:
        raise ValueError(f"--minutes must be positive, got {args.minutes:g}.")
    if args.dry_run and args.out is None:
        raise ValueError("--dry-run needs --out FILE: what it finds is no measurement, and must not be read later.")
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("gate4d tune needs a GPU, and torch.cuda.is_available() is False.")
    out = tile_tables.path() if args.out is None else args.out
    gpu = "none (a dry run)" if args.dry_run else torch.cuda.get_device_name()
    works = tuning.plan(TINY if args.dry_run else FULL)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(works, Path(folder) / "results.json", args.minutes, resume=False)
    measured = [row for row in result["rows"] if row["error"] is None]
    failed = [row for row in result["rows"] if row["error"] is not None]
    for row in result["rows"]:
        best = row["error"] or min(row["medians"], key=row["medians"].__getitem__)
        print("\n".join(wrapped(f"{row['what']}: {best}", then="  ")))
    if not measured:
        print("nothing was measured: give more --minutes." if not failed else "nothing was measured.")
        return 1
    rows = tuning.tuned(result)
    tile_tables.write(out, gpu, rows)
    print(f"{len(rows)} of {len(measured)} shapes are replaced: {out}")
    return int(bool(failed))
