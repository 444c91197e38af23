"""`b2t prepare`: recordings into a dataset that training reads."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b2t.arguments import seed
from b2t.counted import counted
from b2t.errors import UserError
from b2t.records import require_writable

if TYPE_CHECKING:
    from b2t.signal_processing import ProcessingOptions

SUMMARY = "read recordings (see docs/DATA.md for the formats) into an Arrow dataset"

_EPILOG = """\
examples:
  the Brain-to-Text '25 release (z-scored already, with its own splits):
    b2t prepare hdf5_data_final data/t15
  continuous EEG, for training a tokenizer without text:
    b2t prepare recordings/ data/eeg --window 2 --overlap 0.5 --resample 128
  the same, filtered and re-referenced; then a new recording as that one was prepared:
    b2t prepare recordings/ data/eeg --band-pass 0.5,45 --notch 50 --reference average
    b2t prepare new.edf data/new --like data/eeg
  epochs with words in their metadata; no word of one split in another:
    b2t prepare words-epo.fif data/words --text-column association --disjoint-text
  leave one subject out, as the test split:
    b2t prepare feis/ data/feis --text-column Label --split-by subject --hold-out 02.articulators

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
    _add_processing_arguments(parser)
    _add_signal_arguments(parser)
    parser.add_argument("--resample", metavar="HZ", type=float, help="new sampling rate in Hz")
    _add_split_arguments(parser)
    _add_cutting_arguments(parser)
    parser.add_argument(
        "--skip-bad-trials",
        action="store_true",
        help="leave out trials that are empty, hold NaN or occur twice, instead of stopping at the "
        "first",
    )
    _add_output_arguments(parser)


def _add_split_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--split-by",
        choices=("trial", "session", "block", "subject", "sentence"),
        default="trial",
        help="what is never divided between splits; it replaces the source's own splits, and "
        "recordings are not divided in time (default: trial)",
    )
    parser.add_argument(
        "--hold-out",
        metavar="NAME,…",
        help="the sessions, blocks (SESSION/BLOCK), subjects or sentences of --split-by that are "
        "the test split: leave one out; the others become train and val as without --split-by",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the random split (default: 0)")


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


def _add_processing_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is done to signals, in this order")
    group.add_argument(
        "--bad-channels", metavar="A,B,…", help="set to 0, and left out of the average reference"
    )
    group.add_argument(
        "--reference",
        choices=("recorded", "average"),
        default="recorded",
        help="average: subtract the mean over all good channels from each (default: recorded)",
    )
    group.add_argument(
        "--band-pass",
        metavar="LOW,HIGH",
        help="corners in Hz of a Butterworth filter of order 4; one alone as 0.5, or ,45",
    )
    group.add_argument("--notch", metavar="HZ,…", help="frequencies to take out, such as 50,100")
    group.add_argument(
        "--causal",
        action="store_true",
        help="filter forwards alone, as `b2t decode --follow` can do it while bins come (default: "
        "forwards and backwards, without shift of phase)",
    )
    group.add_argument(
        "--normalize",
        choices=("auto", "block", "session", "recording", "none"),
        default="auto",
        help="z-score each channel within its block, session or recording (file); none: keep the "
        "unit; auto: block, but none for what is z-scored already, as T15 (default: auto)",
    )
    group.add_argument(
        "--statistics",
        choices=("train", "all"),
        default="train",
        help="z-score by training trials alone, or by all trials of a block, held-out ones included"
        " (default: train)",
    )
    group.add_argument(
        "--like",
        metavar="FOLDER",
        type=Path,
        help="do what was done to the prepared dataset FOLDER, by its statistics where it knows "
        "the session",
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
        help="which axis of an array comes first (default: time-first)",
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

    like = _like(args)
    options = PrepareOptions(
        normalize=args.normalize,
        statistics=args.statistics,
        like=None if like is None or args.normalize == "none" else str(args.like),
        fractions=parse_split(args.split),
        disjoint_text=args.disjoint_text,
        split_by=args.split_by,
        hold_out=_names(args.hold_out, "--hold-out") or (),
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
    reopen = Reopen(tuple(args.sources), reading, args.format, _processing(args))
    source = reopen.open()
    if like is not None:
        _require_same_channels(like["channels"], source.channels, args.like)
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


def _like(args: argparse.Namespace) -> dict[str, Any] | None:
    """Take what was done to another dataset into the arguments; return its record.

    Raises:
        UserError: it is no prepared dataset, or something else is asked for as well.
    """
    from b2t.data.record import read_record

    if args.like is None:
        return None
    record = read_record(args.like)
    if "normalization" not in record:
        raise UserError(
            f"--like {args.like}: no dataset of `b2t prepare` is there (it holds no b2t.json)"
        )
    given = {
        "--bad-channels": args.bad_channels,
        "--reference": args.reference != "recorded",
        "--band-pass": args.band_pass,
        "--notch": args.notch,
        "--causal": args.causal,
        "--normalize": args.normalize != "auto",
        "--resample": args.resample,
    }
    doubled = [name for name, value in given.items() if value]
    if doubled:
        raise UserError(f"--like {args.like} says what is done: leave out {', '.join(doubled)}")
    args.normalize = record["normalization"]
    args.resample = record["sampling_rate"]
    return record


def _require_same_channels(wanted: list[str], found: list[str], folder: Path) -> None:
    if list(wanted) != list(found):
        raise UserError(
            f"--like {folder} has the channels {', '.join(wanted[:6])} … ({len(wanted)}), the "
            f"recordings {', '.join(found[:6])} … ({len(found)}): choose the same in the same order"
            " with --channels"
        )


def _processing(args: argparse.Namespace) -> "ProcessingOptions":
    """Read what is done to signals.

    Raises:
        UserError: what is no frequency, or a band of no width.
    """
    from b2t.data.record import read_record
    from b2t.options import checked
    from b2t.signal_processing import ProcessingOptions

    if args.like is not None:
        return ProcessingOptions(**(read_record(args.like).get("processing") or {}))
    given = {
        "bad_channels": list(_names(args.bad_channels, "--bad-channels") or ()),
        "reference": args.reference,
        "band_pass": _band(args.band_pass),
        "notch": [_hertz(part, "--notch") for part in (args.notch or "").split(",") if part],
        "causal": args.causal,
    }
    return checked(ProcessingOptions, given, "prepare")


def _band(text: str | None) -> tuple[float | None, float | None]:
    low, _, high = (text or "").partition(",")
    return tuple(_hertz(part, "--band-pass") if part.strip() else None for part in (low, high))  # type: ignore[return-value]


def _hertz(text: str, option: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{option} {text}: expected a frequency in Hz above 0")
    return value


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
    if content["normalization"] != "none":
        scale = f"z-scored per {content['normalization']}"
    elif content["z_scored"]:
        scale = "z-scored per block by the source"
    lines = [
        f"{out}: {rows} trials ({kind})",
        f"  {counted(len(content['channels']), 'channel')} at {content['sampling_rate']:g} Hz, "
        f"{scale}",
    ]
    if content.get("processing"):
        from b2t.signal_processing import ProcessingOptions

        lines.append(f"  {ProcessingOptions(**content['processing']).told()}")
    if content["dtype"] != "float32":
        lines.append(
            f"  stored as {content['dtype']}: {content['rounding_snr_db']:g} dB over rounding"
        )
    lines += [
        f"  {name} lacks {counted(len(lacking), 'channel')}, 0 there ({', '.join(lacking[:5])}"
        f"{' …' if len(lacking) > 5 else ''})"
        for name, lacking in content.get("missing_channels", {}).items()
        if lacking
    ]
    if content["skipped"]:
        lines.append(f"  {counted(content['skipped'], 'bad trial')} left out")
    return "\n".join([*lines, f"  look at it: b2t inspect {out}"])


def _names(text: str | None, option: str = "--channels") -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UserError(f"{option} {text!r} names nothing")
    return names
