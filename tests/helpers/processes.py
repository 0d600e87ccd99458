"""The command line as a shell starts it, and Ctrl-C as a terminal sends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def gate4d_process(arguments, stderr=subprocess.PIPE):
    """``gate4d`` as a shell starts it, in a process group of its own."""
    code = "import sys; from gate4d.cli.main import main; sys.exit(main(sys.argv[1:]))"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=stderr, text=True,
        # What a shell starts in the background ignores Ctrl-C, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def interrupted(process, when, log=None):
    """What it printed after Ctrl-C to all processes of its group, once ``when()``; ``log`` is where stderr goes."""
    end = time.monotonic() + 240
    try:
        while not when():
            assert process.poll() is None, (process.communicate(), log and log.read_text())
            assert time.monotonic() < end, "it did not come so far"
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    err = log.read_text() if log else err
    if others := [n for n in group(process.pid) if n != process.pid]:
        pytest.fail(f"processes {others} live on")
    assert "Traceback" not in err, err
    assert "interrupted, nothing was written" in err
    assert process.returncode == 130
    return out


def group(leader):
    """Numbers of the processes of a group that run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, number = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(number) == leader and state != "Z":
            found.append(int(folder.name))
    return found
