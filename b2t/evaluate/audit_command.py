"""`b2t audit`: what in a dataset could make scores too good."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

SUMMARY = "look for what makes scores too good: sentences that splits share"
EPILOG = """\
examples:
  b2t audit prepared/t15
  b2t audit prepared/t15 --nearness 0.7 --out audit.json --strict

Compares the sentences of all splits as they are scored, word for word and nearly: 1 − word edits /
words of the longer sentence is at least --nearness. With --strict the exit status is 1 where
anything but notes was found."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `b2t audit`."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dataset", help="prepared folder, Hugging Face id, or parquet glob")
    parser.add_argument("--nearness", type=_share, default=0.8, help="of near sentences (0.8)")
    parser.add_argument("--out", type=Path, help="JSON file to write as well")
    parser.add_argument("--strict", action="store_true", help="status 1 for warnings")


def run(args: argparse.Namespace) -> int:
    """Check, print, and write where asked."""
    from b2t.data.dataset import dataset_info, load_trials
    from b2t.evaluate.audit import NOTE, shared_sentences
    from b2t.records import require_writable, write_atomically

    if args.out is not None:
        require_writable(args.out.parent, "--out")
    known = list(dataset_info(args.dataset).splits)
    splits = sorted(known, key=lambda split: (split != "train", known.index(split)))
    texts = {
        split: load_trials(args.dataset, split).select_columns(["text"])["text"] for split in splits
    }
    findings = shared_sentences(texts, args.nearness)
    for finding in findings:
        print(f"{finding.level}: {finding.check}: {finding.text}")
        for example in finding.examples:
            print(f"    {example}")
    if not findings:
        print(f"note: {args.dataset} has one split alone ({', '.join(splits)}): nothing to compare")
    if args.out is not None:
        record = {"dataset": args.dataset, "findings": [asdict(finding) for finding in findings]}
        write_atomically(args.out, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        print(f"written: {args.out}")
    return int(args.strict and any(finding.level != NOTE for finding in findings))


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most 1, found {text}")
    return value
