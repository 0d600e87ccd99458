"""``gate4d info``: versions, the processor, and which backends can run here and why the others cannot."""

from __future__ import annotations

import argparse
import json
import os

import torch

from gate4d.benchmarks import machine
from gate4d.kernels.attention import backends
from gate4d.kernels.attention.op import Request
from gate4d.kernels.support import (
    Backend,
    cuda_library_error,
    library_error,
    recorded,
    tile_tables,
    verdicts_directory,
    verify_mode,
)
from gate4d.terminal import field, wrapped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what :func:`collect` finds."""
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else render(facts))
    return 0


def collect() -> dict:
    """Versions, machine and backends as plain data."""
    return {
        "versions": machine.versions(),
        "machine": {**machine.hardware(), "threads": torch.get_num_threads()},
        "library": {
            "error": library_error(),
            "cuda_error": cuda_library_error(),
            "cpu_path": _cpu_path(),
            "GATE4D_CPU_ISA": os.environ.get("GATE4D_CPU_ISA"),
        },
        "calls": {name: _served(request) for name, request in typical_requests().items()},
        "measured": len(backends.MEASURED),
        "tiles": tile_tables.about(),
        "verified": verdicts(),
    }


def verdicts() -> dict:
    """What came of the checks of GPU kernels before their first use, as far as it is on disk for the GPUs here."""
    found = [v for request in _gpus() for v in recorded(request)]
    failed = [v for v in found if v.error is not None]
    return {
        "mode": verify_mode(),
        "folder": str(verdicts_directory()),
        "right": len(found) - len(failed),
        "failed": [{"operator": v.operator, "configuration": v.configuration, "error": v.error} for v in failed],
    }


def _gpus() -> list[Request]:
    """A request to each GPU."""
    indices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return [Request("cuda", torch.float32, 64, 64, device_index=i) for i in indices]


def typical_requests() -> dict[str, Request]:
    """The calls that ``info`` asks every backend about: 64 channels a head, no statistics."""
    requests = {}
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for name, dtype, gate in (
            ("fp32 gated", torch.float32, "pairwise"),
            ("bf16 gated", torch.bfloat16, "pairwise"),
            ("bf16 gate on keys", torch.bfloat16, "keys"),
            ("bf16 keys dropped", torch.bfloat16, "drop"),
            ("fp32 un-gated", torch.float32, ""),
        ):
            label = name if device == "cpu" else f"{name} ({device})"
            index = 0 if device == "cuda" else None
            requests[label] = Request(
                device_type=device, dtype=dtype, head_dim=64, value_dim=64, gate=gate, device_index=index
            )
    return requests


def render(facts: dict) -> str:
    """The facts as plain text in 80 columns."""
    versions, here, library = facts["versions"], facts["machine"], facts["library"]
    features = [f"{name} {'yes' if has else 'no'}" for name, has in (here["features"] or {}).items()]
    isa = library["cpu_path"] or "none: the compiled library is not loaded"
    if library["GATE4D_CPU_ISA"]:
        isa += f" (GATE4D_CPU_ISA={library['GATE4D_CPU_ISA']})"
    lines = [
        *field("gate4d", versions["gate4d"]),
        *field("torch", f"{versions['torch']}, triton {versions['triton'] or 'not installed'}"),
        *field("python", f"{versions['python']}, numpy {versions['numpy']}"),
        *field("platform", versions["system"]),
        *field("processor", here["processor"]),
        *field("features", ", ".join(features) or f"torch sees {here['capability']}"),
        *field("threads", f"{here['threads']} of {here['cores']} cores"),
        *field("GPU", ", ".join(here["gpu"]) or "none"),
        *field("CPU path", isa),
        *field("CUDA C++", library["cuda_error"] or "norm_rope, asked for with backend='cuda'"),
        *(field("GPU tiles", facts["tiles"]) if here["gpu"] or "not used" in facts["tiles"] else []),
        *_verified(facts["verified"]),
        "",
        "Which backend can serve a call here (head dim 64):",
        "",
    ]
    names = list(backends.BACKENDS)
    lines.append(f"  {'call':<26}{'auto takes':<16}others that can")
    for call, served in facts["calls"].items():
        others = ", ".join(n for n in names if not served["reasons"][n] and n != served["auto"]) or "none"
        row = f"  {call:<26}{served['auto']:<16}"
        lines += wrapped(others, row, " " * len(row))
    by_name = [n for n in names if not any(n in order for order in backends.AUTO_ORDER.values())]
    rows = "no row yet" if not facts["measured"] else f"{facts['measured']} row(s)"
    note = f"auto takes {' and '.join(by_name)} only where a measurement says so: {rows} in the table of measurements."
    lines += ["", *wrapped(note, "  ", "  ")]
    # Reasons that differ in what was got alone share a line.
    reasons: dict[tuple[str, str], list[str]] = {}
    for name in names:
        for served in facts["calls"].values():
            for reason in served["reasons"][name]:
                why, *got = reason.split(", got ", 1)
                known = reasons.setdefault((name, why), [])
                known += [x for x in got if x not in known]
    if reasons:
        lines += ["", "Why not:"]
        for (name, why), got in reasons.items():
            text = f"{name}: {why}" + (f", got {' or '.join(got)}" if got else "")
            lines += wrapped(text, "  ", "    ")
    if library["error"]:
        lines += ["", "What to do:", *wrapped(advice(), "  ", "  ")]
    return "\n".join(lines)


def _verified(facts: dict) -> list[str]:
    """Nothing where no kernel was ever checked."""
    if not facts["right"] and not facts["failed"]:
        return []
    lines = field("verified", f"{facts['right']} kernel(s) right, {len(facts['failed'])} failed, in {facts['folder']}")
    for v in facts["failed"]:
        lines += wrapped(f"{v['operator']} ({v['configuration']}) is not used: {v['error']}", "    ", "      ")
    return lines


def advice() -> str:
    """How to get the compiled kernels."""
    return (
        "Until then gated calls run on the reference backend: right, but slow, and its memory grows with the square "
        "of the tokens. For the compiled kernels install a C++17 compiler (Debian: apt-get install g++), leave "
        "GATE4D_BUILD unset, and reinstall: remove .venv/.ready and run `make setup` in a clone, or "
        "`pip install --no-build-isolation --force-reinstall --no-deps gate4d` elsewhere."
    )


def _served(request: Request) -> dict:
    reasons = {name: _reasons(b, request) for name, b in backends.BACKENDS.items()}
    try:
        auto = backends.select("auto", request, trying=False).name
    except NotImplementedError:
        auto = "nothing"
    return {"auto": auto, "reasons": reasons}


def _reasons(backend: Backend, request: Request) -> list[str]:
    failure = backend.failure(request, trying=False)
    return [*backend.not_supported_reasons(request), *([failure] if failure is not None else [])]


def _cpu_path() -> str | None:
    """The instruction set that the compiled kernels chose, None without them."""
    if library_error() is not None:
        return None
    try:
        return torch.ops.gate4d.cpu_isa()
    except (AttributeError, RuntimeError) as e:
        return f"unknown ({e})".splitlines()[0]
