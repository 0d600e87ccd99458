"""The command line's entry, ``gate4d info``, and what make says on a machine that is not ready."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gate4d.benchmarks import machine
from gate4d.cli import info
from gate4d.cli.main import COMMANDS, main
from gate4d.kernels import support
from gate4d.kernels.attention import backends, flex

ROOT = Path(__file__).parents[2]
NO_LIBRARY = "the compiled library is missing (no C++ compiler: 'c++' was not found); install a C++ compiler"


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(support, "kernel_error", lambda operator: NO_LIBRARY)
    monkeypatch.setattr(info, "library_error", lambda: NO_LIBRARY)
    monkeypatch.setattr(backends, "_selected", {})


def lines_of(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_info_is_plain_text_in_80_columns(capsys):
    assert main(["info"]) == 0
    lines = lines_of(capsys)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for needed in (torch.__version__, "processor", "threads", "CPU path", "auto takes", *backends.BACKENDS):
        assert needed in text
    assert "sdpa: it cannot apply a gate" in text
    assert "triton: it needs CUDA tensors, got cpu" in text
    assert "alone, got one of the kind 'pairwise' or one of the kind 'drop' or a call without a gate" in text
    if not backends.MEASURED:
        assert "auto takes sdpa_folded only where a measurement says so: no row yet" in text


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["machine"]["threads"] == torch.get_num_threads()
    gated = facts["calls"]["fp32 gated"]
    assert gated["reasons"]["reference"] == []
    assert facts["calls"]["bf16 gate on keys"]["reasons"]["sdpa_folded"] == []
    assert facts["calls"]["bf16 keys dropped"]["reasons"]["sdpa_compacted"] == []
    assert facts["measured"] == len(backends.MEASURED)
    assert gated["auto"] == ("reference" if facts["library"]["error"] else "cpu")


def test_info_without_the_library_says_why_and_what_to_do(no_library, capsys):
    assert main(["info"]) == 0
    lines = lines_of(capsys)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "cpu: the compiled library is missing (no C++ compiler: 'c++' was not found)" in text
    assert "What to do:" in text
    assert "apt-get install g++" in text
    row = next(line for line in lines if "fp32 gated" in line)
    assert row.split() == ["fp32", "gated", "reference", "flex" if flex.HAS_COMPILER else "none"]


@pytest.mark.parametrize("serving", [True, False])
def test_info_fits_80_columns_whatever_can_run(serving, monkeypatch, capsys):
    """Every backend able, or none, on a machine with a GPU."""
    reasons = [] if serving else ["it is switched off"]
    every = {n: replace(b, not_supported_reasons=lambda r: reasons) for n, b in backends.BACKENDS.items()}
    monkeypatch.setattr(backends, "BACKENDS", every)
    monkeypatch.setattr(backends, "_selected", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["info"]) == 0
    lines = lines_of(capsys)
    assert max(map(len, lines)) <= 80
    table = "\n".join(lines[lines.index("Which backend can serve a call here (head dim 64):") :])
    assert "bf16 gated (cuda)" in table
    if serving:
        assert all(table.count(name) >= 10 for name in every)
        assert "Why not" not in table
    else:
        assert table.count("nothing") == 10
        assert all(f"{name}: it is switched off" in table for name in every)


def test_info_names_the_forced_instruction_set(monkeypatch, capsys):
    monkeypatch.setenv("GATE4D_CPU_ISA", "avx2")
    main(["info"])
    assert "(GATE4D_CPU_ISA=avx2)" in capsys.readouterr().out


def test_info_without_proc(monkeypatch, capsys):
    monkeypatch.setattr(machine, "cpuinfo", dict)
    assert main(["info"]) == 0
    assert "features   torch sees" in capsys.readouterr().out


def test_info_does_not_fail_without_the_operator(monkeypatch):
    monkeypatch.setattr(info, "library_error", lambda: None)
    monkeypatch.setattr(torch.ops, "gate4d", object())
    assert info._cpu_path().startswith("unknown")


def test_core_and_info_need_no_extras():
    blocked = "av", "PIL", "matplotlib", "rich", "triton", "sklearn", "skimage", "scipy"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from gate4d.cli.main import main; main(['info'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "auto takes" in run.stdout


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"], ["demo", "--frames", "many"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as e:
        main(arguments)
    assert e.value.code == 2
    assert "usage: gate4d" in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def make(tmp_path, python: str) -> tuple[subprocess.CompletedProcess, Path]:
    """``make setup`` with a stand-in for Python, into a new environment folder."""
    fake, venv = tmp_path / "python", tmp_path / "venv"
    fake.write_text(f"#!/bin/sh\n{python}\n")
    fake.chmod(0o755)
    arguments = ["make", "--no-print-directory", "-C", str(ROOT), "setup", f"PYTHON={fake}", f"VENV={venv}"]
    return subprocess.run(arguments, capture_output=True, text=True), venv


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("python", "message"),
    [
        ('case "$*" in *version_info*) echo 3.9.2; exit 1;; esac', "gate4d needs Python 3.10 or newer, but"),
        ('case "$*" in *ensurepip*) exit 1;; esac', "apt-get install python3-venv"),
    ],
)
def test_make_says_what_is_missing(tmp_path, python, message):
    run, venv = make(tmp_path, python)
    assert run.returncode != 0
    assert message in run.stdout + run.stderr
    assert not venv.exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_without_python(tmp_path):
    arguments = ["make", "-C", str(ROOT), "setup", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}"]
    run = subprocess.run(arguments, capture_output=True, text=True)
    assert run.returncode != 0
    assert "no-such-python was not found" in run.stdout + run.stderr
