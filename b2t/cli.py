"""The `b2t` command: one subcommand per job, each defined beside the code that does it."""

import argparse
import errno
import importlib
import os
import sys

from b2t.closed_pipe import until_closed
from b2t.errors import UserError
from b2t.log import configure, quiet_libraries
from b2t.terminal import show_in_any_encoding

COMMANDS = {
    "simulate": "b2t.data.simulate_command",
    "prepare": "b2t.data.prepare_command",
    "inspect": "b2t.data.inspect_command",
    "audit": "b2t.evaluate.audit_command",
    "evaluate": "b2t.evaluate.evaluate_command",
    "decode": "b2t.evaluate.decode_command",
    "score": "b2t.evaluate.score_command",
    "lm": "b2t.evaluate.lm_command",
    "adapt": "b2t.train.adapt_command",
    "tokenize": "b2t.evaluate.tokenize_command",
    "export": "b2t.evaluate.export_command",
    "report": "b2t.report.report_command",
    "watch": "b2t.report.watch_command",
    "plan": "b2t.train.plan_command",
    "doctor": "b2t.train.doctor_command",
}

_PLACE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}
"""What a disk says of a place, whichever command meets it; other errors are ours."""


def parser() -> argparse.ArgumentParser:
    """Arguments of all subcommands."""
    top = argparse.ArgumentParser(
        prog="b2t",
        description="Brain-to-text training at scale: data, evaluation, reports. "
        "Training itself is started with deepspeed train_ds.py (see train_ds.py --help).",
        epilog="exit status: 0 done, 2 mistake in the input, 130 interrupted, 141 nobody reads "
        "the output any more (| head); a command's own help names others.",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(_handler=module.run)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; return its exit status."""
    quiet_libraries()
    show_in_any_encoding()
    configure()
    return until_closed(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return arguments._handler(arguments)
    except UserError as error:
        print(f"b2t {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"b2t {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in _PLACE_ERRORS:
            raise
        # A write that fails, unlike an open, does not say where.
        place = error.filename or getattr(arguments, "out", None)
        place = f"{place}: " if place else ""
        print(
            f"b2t {arguments.command}: error: {place}{os.strerror(error.errno)}: free some space, "
            "or choose another place to read or write",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
