"""`b2t audit`: what is wrong with a dataset, before a model is trained on it."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from b2t.errors import UserError

if TYPE_CHECKING:
    from b2t.evaluate.audit import Audit, AuditOptions, Finding, Subject

SUMMARY = "look for what spoils training or makes scores too good, and say what to do"
EPILOG = """\
examples:
  b2t audit prepared/t15
  b2t audit prepared/t15 --config t15 data.max_text_tokens=90 --strict
  b2t audit prepared/t15 --plot audit.png --out audit.json
  b2t audit prepared/eeg --trials 200

Looks for sentences that splits share (word for word, and nearly: 1 − word edits / words of the
longer sentence is at least --nearness), signals that occur twice, dead, constant, clipping and
swapped channels, NaN, outliers, mains hum, units, labels longer than CTC frames allow, and texts
that the tokenizer cannot write. --config says which model is meant: its patches, tokenizer and
longest text. With --strict the exit status is 1 where anything but notes was found."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `b2t audit`."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dataset", help="prepared folder, Hugging Face id, or parquet glob")
    parser.add_argument("--nearness", type=_share, default=0.8, help="of near sentences (0.8)")
    parser.add_argument(
        "--trials", type=_count, metavar="N", help="read N signals per split, not all"
    )
    parser.add_argument(
        "--config",
        nargs="+",
        metavar=("NAME|FILE", "section.key=value"),
        help="preset or YAML file of the model that is meant, and keys to override",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG, PDF or SVG to draw")
    parser.add_argument("--out", type=Path, help="JSON file to write as well")
    parser.add_argument("--strict", action="store_true", help="status 1 for warnings")


def run(args: argparse.Namespace) -> int:
    """Check, print, and write where asked."""
    from b2t.evaluate.audit import audit, is_clean
    from b2t.evaluate.audit.figure import draw_audit
    from b2t.log import quiet_libraries
    from b2t.records import require_file, write_atomically

    quiet_libraries()
    if args.out is not None:
        require_file(args.out, "--out")
    if args.plot is not None:
        _require_picture(args.plot)
    subject = _subject(args.dataset)
    found = audit(subject, _options(args, subject))
    _print(args.dataset, subject, found)
    if args.out is not None:
        record = {
            "dataset": args.dataset,
            "trials": found.trials,
            "findings": [asdict(finding) for finding in found.findings],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        print(f"written: {args.out}")
    if args.plot is not None:
        draw_audit(subject, found, args.plot, args.dataset)
        print(f"plot: {args.plot}")
    return int(args.strict and not is_clean(found.findings))


def _subject(path: str) -> "Subject":
    from b2t.data.dataset import unexamined
    from b2t.evaluate.audit import Subject

    data = unexamined(path)
    return Subject.of(data.splits, data.channels, data.sampling_rate, data.record)


def _options(args: argparse.Namespace, subject: "Subject") -> "AuditOptions":
    from b2t.evaluate.audit import AuditOptions
    from b2t.evaluate.audit.labels import Patches
    from b2t.model.tokenizer import build_tokenizer, byte_tokenizer

    if args.config is None:
        return AuditOptions(args.nearness, args.trials, tokenizer=byte_tokenizer(), progress=True)
    from b2t.config import load_config

    config = load_config(args.config[0], args.config[1:])
    text, encoder = config.model.text_decoder, config.model.encoder
    texts = subject.splits["train"]["text"] if "train" in subject.splits else []
    tokenizer = None
    if text.enabled and any(texts):
        tokenizer = build_tokenizer(
            text.tokenizer,
            [each for each in texts if each],
            text.bpe_vocab_size,
            checkpoint=text.checkpoint,
            causal=text.kind == "causal_lm",
        )
    return AuditOptions(
        args.nearness,
        args.trials,
        patches=Patches(encoder.patch_size, encoder.patch_stride),
        tokenizer=tokenizer,
        max_tokens=config.data.max_text_tokens,
        progress=True,
    )


def _print(path: str, subject: "Subject", found: "Audit") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from b2t.evaluate.audit import NOTE, verdict

    console = Console(highlight=False, soft_wrap=True)
    total = sum(len(rows) for rows in subject.splits.values())
    read = f"{found.trials:,}" if found.trials == total else f"{found.trials:,} of {total:,}"
    console.print(f"[bold]{escape(path)}[/bold]  {read} trials", end="\n\n")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("check", "", "found"):
        table.add_column(heading)
    for finding in found.findings:
        table.add_row(
            finding.check, "" if finding.level == NOTE else finding.level, escape(finding.text)
        )
    console.print(table)
    for finding in found.findings:
        for line in _details(finding):
            console.print(line, markup=False)
    console.print(f"\nverdict: {verdict(found.findings)}", markup=False)


def _details(finding: "Finding") -> list[str]:
    """Return where it was found and what to do; nothing for notes."""
    from b2t.evaluate.audit import NOTE

    if finding.level == NOTE:
        return []
    lines = ["", f"{finding.level}: {finding.check}: {finding.text}"]
    lines += [f"    {example}" for example in finding.examples]
    return [*lines, f"    → {finding.remedy}"] if finding.remedy else lines


def _require_picture(file: Path) -> None:
    from b2t.records import require_writable

    if file.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {file}: expected a name ending in .png, .pdf or .svg")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--plot {file}: no folder {file.absolute().parent}")
    require_writable(file.absolute().parent, "--plot")


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most 1, found {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return value
