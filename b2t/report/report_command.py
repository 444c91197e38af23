"""`b2t report`: one HTML file about a run, or about several on the same axes."""

import argparse
from pathlib import Path

SUMMARY = "write a self-contained HTML report of a run, or compare several"
EPILOG = """\
examples:
  b2t report runs/demo
  b2t report runs/demo runs/demo-512 runs/demo-1024 --out comparison

Works on a run that is under way, finished or crashed. Writes report.html (nothing to fetch, light
and dark), one PNG per figure, and report.json, into RUN/report. `b2t evaluate RUN` before it adds
decoded sentences, controls, traces and the usage of every code."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `b2t report`."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN/report)")


def run(args: argparse.Namespace) -> int:
    """Write the report and print the verdict."""
    from b2t.report.run_data import load_run
    from b2t.report.summary import summarize, write_report

    page = write_report(args.runs, args.out)
    for folder in args.runs:
        summary = summarize(load_run(folder))
        print(f"{folder}: {summary.verdict} ({summary.state})")
        for reason in summary.reasons:
            print(f"  {reason}")
        for advice in summary.advice[:3]:
            print(f"  try: {advice.remedy}")
    print(f"written: {page}")
    return 0
