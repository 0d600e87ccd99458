"""The ``gate4d`` command: one file per subcommand, imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "info": "versions, processor features, and which backends can run here",
    "bench": "measure the targets against peers in the same run",
    "eval": "systems on rendered clips with known cameras, depth and motion",
    "run": "a method on a clip: masks, scores, poses and points as files",
    "demo": "the main job on a clip, three attention implementations side by side",
}


def main(argv: list[str] | None = None) -> int:
    """Parse ``argv`` and run a subcommand; bad input ends with one paragraph and exit status 2."""
    parser = argparse.ArgumentParser(prog="gate4d", description="Motion-aware, fast attention for 3D reconstruction.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = (argv if argv is not None else sys.argv[1:])[:1]
    for name, text in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text)
        if chosen == [name]:  # a command's imports are paid for only by that command
            importlib.import_module(f"gate4d.cli.{name}").add_arguments(sub)
    args = parser.parse_args(argv)
    command = importlib.import_module(f"gate4d.cli.{args.command}")
    try:
        return command.run(args)
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as e:
        print(f"gate4d {args.command}: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
