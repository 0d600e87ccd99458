"""The ``gate4d`` command: one file per subcommand, imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys

from .theirs import TheirError

COMMANDS = {
    "info": "versions, processor features, and which backends can run here",
    "bench": "measure the targets against peers in the same run",
    "eval": "systems on rendered clips with known cameras, depth and motion",
    "run": "a method on a clip: masks, scores, poses and points as files",
    "tune": "measure tile shapes on this machine's GPU and keep the fastest",
    "demo": "the main job on a clip, three attention implementations side by side",
}


def main(argv: list[str] | None = None) -> int:
    """Parse ``argv`` and run a subcommand.

    Bad input ends with one paragraph and exit status 2; an exception inside the user's own code with a paragraph and
    its traceback, marked as theirs, and 2; Ctrl-C with a line and 130, the shells' status for it.
    """
    chosen = (argv if argv is not None else sys.argv[1:])[:1]
    name = chosen[0] if chosen and chosen[0] in COMMANDS else ""
    try:
        return _run(argv, name)
    except KeyboardInterrupt:
        print(f"\ngate4d {name}: interrupted, nothing was written.", file=sys.stderr)
        return 130
    except TheirError as e:
        print(f"gate4d {name}: {e}\n\nThe traceback of that code, which is not gate4d's:", file=sys.stderr)
        print(e.traceback, end="", file=sys.stderr)
        return 2
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as e:
        print(f"gate4d {name}: {e}", file=sys.stderr)
        return 2


def _run(argv: list[str] | None, chosen: str) -> int:
    parser = argparse.ArgumentParser(prog="gate4d", description="Motion-aware, fast attention for 3D reconstruction.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text)
        if name == chosen:  # a command's imports are paid for only by that command
            importlib.import_module(f"gate4d.cli.{name}").add_arguments(sub)
    args = parser.parse_args(argv)
    command = importlib.import_module(f"gate4d.cli.{args.command}")
    return command.run(args)


if __name__ == "__main__":
    sys.exit(main())
