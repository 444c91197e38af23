"""`b2t prepare`: recordings into a dataset that training reads."""

import argparse
from pathlib import Path
from typing import Any

from b2t.arguments import seed
from b2t.errors import UserError
from b2t.records import require_writable

SUMMARY = "read recordings (see docs/DATA.md for the formats) into an Arrow dataset"

_EPILOG = """\
examples:
  the Brain-to-Text '25 release (z-scored already, with its own splits):
    b2t prepare hdf5_data_final data/t15
  continuous EEG, for training a tokenizer without text:
    b2t prepare recordings/ data/eeg --window 2 --overlap 0.5 --resample 128
  epochs with words in their metadata; no word of one split in another:
    b2t prepare words-epo.fif data/words --text-column association --disjoint-text

Continuous recordings are split in time: the first 80 % of each is for training. Look at the result
with `b2t inspect`; train on it with data.path=FOLDER.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        type=Path,
        nargs="+",
        help="a recording or a folder; several become one dataset, channels aligned by name",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the new dataset")
    parser.add_argument(
        "--source",
        metavar="FORMAT",
        dest="format",
        help="format of SOURCE: bids, t15, t12, pickle, zuco, nwb, labram, mne, mat, numpy, csv, "
        "or one that another package brings (default: found by looking)",
    )
    parser.add_argument(
        "--normalize",
        choices=("auto", "block", "none"),
        default="auto",
        help="block: z-score each channel over its block (T15) or recording; none: keep the unit; "
        "auto: block, but none for T15, which is z-scored already (default: auto)",
    )
    _add_signal_arguments(parser)
    parser.add_argument("--resample", metavar="HZ", type=float, help="new sampling rate in Hz")
    parser.add_argument(
        "--split",
        metavar="A/B/C",
        default="0.8/0.1/0.1",
        help="shares of train, val and test where the source has no splits (default: 0.8/0.1/0.1)",
    )
    parser.add_argument(
        "--disjoint-text",
        action="store_true",
        help="keep all trials of one text in one split: no test sentence was seen in training",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the random split (default: 0)")
    _add_cutting_arguments(parser)
    parser.add_argument(
        "--skip-bad-trials",
        action="store_true",
        help="leave out trials that are empty, hold NaN or occur twice, instead of stopping at the "
        "first",
    )
    _add_output_arguments(parser)


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="how signals are stored; float16 takes half the disk, and its rounding is printed "
        "(default: float32)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=int,
        help="processes that read (default: as many as there are cores, up to 8)",
    )
    parser.add_argument("--licence", metavar="TEXT", help="of the recordings, for the data card")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier dataset at OUT"
    )


def _add_cutting_arguments(parser: argparse.ArgumentParser) -> None:
    recordings = parser.add_argument_group("continuous recordings")
    recordings.add_argument(
        "--window",
        metavar="S",
        type=float,
        default=2.0,
        help="cut continuous recordings into windows of S seconds (default: 2)",
    )
    recordings.add_argument(
        "--overlap",
        metavar="F",
        type=float,
        default=0.0,
        help="share of a window that the next one repeats, 0 to below 1 (default: 0)",
    )
    recordings.add_argument(
        "--annotations",
        action="store_true",
        help="cut at annotations instead; their descriptions become the texts",
    )
    recordings.add_argument(
        "--text-column",
        metavar="NAME",
        help="column of epochs, tables or NWB trials that holds the text (epochs: 'event' is the "
        "event's name)",
    )
    recordings.add_argument(
        "--channels",
        metavar="A,B,…",
        help="channels to read, in this order; F* stands for all that match (default: all EEG, MEG "
        "and intracranial ones)",
    )


def _add_signal_arguments(parser: argparse.ArgumentParser) -> None:
    signal = parser.add_argument_group("what is the signal (MATLAB, NumPy, CSV, NWB, ZuCo)")
    signal.add_argument(
        "--signal",
        metavar="NAME",
        help="variable of a .mat, series of an NWB file ('units': spikes), measure of ZuCo's words",
    )
    signal.add_argument(
        "--rate",
        metavar="HZ|NAME",
        help="sampling rate in Hz, or the .mat's variable that holds it",
    )
    signal.add_argument(
        "--layout",
        choices=("time-first", "channels-first"),
        help="which axis of an array comes first (default: time)",
    )
    signal.add_argument(
        "--bin-ms",
        metavar="MS",
        type=float,
        default=20.0,
        help="width of the bins that spikes of NWB units are counted in (default: 20)",
    )
    signal.add_argument(
        "--level",
        choices=("words", "sentences"),
        default="words",
        help="ZuCo: band features of each word, or the EEG of each sentence (default: words)",
    )


def run(args: argparse.Namespace) -> int:
    """Prepare, and say what came out."""
    from b2t.log import quiet_libraries

    quiet_libraries()
    require_writable(args.out.parent, "OUT")
    from b2t.data.prepare import PrepareOptions, Reopen, prepare, source_options
    from b2t.data.sources.joined import JoinedSource

    options = PrepareOptions(
        normalize=args.normalize,
        fractions=parse_split(args.split),
        disjoint_text=args.disjoint_text,
        skip_bad_trials=args.skip_bad_trials,
        seed=args.seed,
        overwrite=args.overwrite,
        dtype=args.dtype,
    )
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: expected 1 or more")
    reading = source_options(
        options,
        window=args.window,
        overlap=args.overlap,
        annotations=args.annotations,
        text_column=args.text_column,
        channels=_names(args.channels),
        resample=args.resample,
        signal=args.signal,
        rate=args.rate,
        layout=args.layout,
        bin_ms=args.bin_ms,
        level=args.level,
    )
    reopen = Reopen(tuple(args.sources), reading, args.format)
    source = reopen.open()
    record = {
        "source": ", ".join(path.name for path in args.sources),
        "reading": vars(reading),
        **({"missing_channels": source.missing} if isinstance(source, JoinedSource) else {}),
    }
    content = prepare(
        source,
        args.out,
        options,
        record=record,
        reopen=reopen,
        workers=args.workers,
        licence=args.licence,
    )
    print(summary(content, args.out))
    return 0


def parse_split(text: str) -> tuple[float, float, float]:
    """Read ``A/B/C``, three shares that sum to 1."""
    try:
        shares = tuple(float(part) for part in text.split("/"))
    except ValueError:
        shares = ()
    # Written so that NaN fails.
    fit = len(shares) == 3 and shares[0] > 0 and shares[1] >= 0 and shares[2] >= 0
    if not fit or not abs(sum(shares) - 1) <= 1e-6:
        raise UserError(
            f"--split {text}: expected three shares of train, val and test that sum to 1, "
            "such as 0.8/0.1/0.1"
        )
    return shares[0], shares[1], shares[2]


def summary(content: dict[str, Any], out: Path) -> str:
    """Say in a few lines what was prepared."""
    rows = ", ".join(f"{split} {count:,}" for split, count in content["rows"].items())
    kind = f"{content['format']}{', SIMULATION' if content['simulated'] else ''}"
    scale = "scale as recorded"
    if content["z_scored"]:
        by = "" if content["normalization"] == "block" else " by the source"
        scale = f"z-scored per block{by}"
    lines = [
        f"{out}: {rows} trials ({kind})",
        f"  {len(content['channels'])} channels at {content['sampling_rate']:g} Hz, {scale}",
    ]
    if content["dtype"] != "float32":
        lines.append(
            f"  stored as {content['dtype']}: {content['rounding_snr_db']:g} dB over rounding"
        )
    lines += [
        f"  {name} lacks {len(lacking)} channels, which are 0 there ({', '.join(lacking[:5])}"
        f"{' …' if len(lacking) > 5 else ''})"
        for name, lacking in content.get("missing_channels", {}).items()
        if lacking
    ]
    if content["skipped"]:
        lines.append(f"  {content['skipped']} bad trials left out")
    return "\n".join([*lines, f"  look at it: b2t inspect {out}"])


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UserError(f"--channels {text!r} names no channel")
    return names
