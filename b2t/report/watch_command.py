"""`b2t watch`: the live state of a run in the terminal."""

import argparse
import time
from pathlib import Path

from b2t.arguments import seconds

SUMMARY = "show the live state of a run in the terminal"
EPILOG = """\
examples:
  b2t watch runs/demo
  b2t watch runs/demo --once

Reads the run folder only, so it can run on another machine that sees the same disk. Ctrl-C ends
it; training does not notice."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `b2t watch`."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--every", type=seconds, default=5.0, help="seconds between looks (5)")
    parser.add_argument("--once", action="store_true", help="print the state and leave")


def run(args: argparse.Namespace) -> int:
    """Show the state until interrupted."""
    from rich.console import Console
    from rich.live import Live

    from b2t.report.run_data import load_run
    from b2t.report.watch import render_state

    console = Console()
    if args.once:
        console.print(render_state(load_run(args.run)))
        return 0
    with Live(render_state(load_run(args.run)), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(max(0.5, args.every))
                live.update(render_state(load_run(args.run)), refresh=True)
        except KeyboardInterrupt:
            return 0
