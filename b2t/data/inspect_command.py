"""`b2t inspect`: what a dataset holds, in a table and a picture."""

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b2t.counted import counted
from b2t.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from b2t.data.dataset import DatasetInfo

SUMMARY = "show what a dataset holds, and plot one trial"

_EPILOG = """\
examples:
  b2t inspect data/t15
  b2t inspect data/t15 --split val --row t15.2023.08.11/5/12 --plot trial.png
  b2t inspect 'parquet/*.parquet' --no-plot
  b2t inspect data/t15 --verify
  b2t inspect data/t15 --augment noise_std=1.0 time_stretch=[0.9,1.1] random_cut_ms=60
  b2t inspect data/t15 --augment 'noise_std={from: 0, to: 1, steps: 2000}'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="a folder written by `b2t prepare`, a parquet glob, or a Hugging Face dataset id",
    )
    parser.add_argument("--split", help="split of the plotted trial (default: the first)")
    parser.add_argument(
        "--row",
        metavar="N",
        default="0",
        help="plotted trial: its position, or its name session/block/trial (default: 0)",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="where to draw it, PNG, PDF or SVG (default: DATASET-SPLIT-N.png in this folder)",
    )
    parser.add_argument("--no-plot", action="store_true", help="only the table")
    parser.add_argument(
        "--augment",
        metavar="KEY=VALUE",
        nargs="*",
        help="plot the trial before and after augmentation instead: all of it, and each that is "
        "on alone; keys of data.augment (default: the defaults of training), ramps of a phase at "
        "their beginning, middle and end",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare every trial with the checksums that `b2t prepare` wrote, and leave",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, draw the trial."""
    from b2t.log import quiet_libraries

    quiet_libraries()
    from b2t.data.dataset import dataset_info, load_trials
    from b2t.data.verification import verify

    if args.verify:
        print(f"{args.dataset}: all {verify(args.dataset):,} trials are as they were prepared")
        return 0
    info = dataset_info(args.dataset)
    splits = {split: load_trials(args.dataset, split) for split in info.splits}
    if args.no_plot:
        _print(info, splits, args.dataset)
        return 0
    # What cannot be drawn is told before the table.
    split = args.split or next(iter(splits))
    trials = load_trials(args.dataset, split)
    row = find_row(trials, args.row)
    name = Path(args.dataset.replace("*", "all")).stem
    file = args.plot or Path(f"{name}-{split}-{row}.png")
    _require_place(file)
    _print(info, splits, args.dataset)
    if args.augment is None:
        _plot(trials, row, info, file)
    else:
        _plot_augmented(trials, row, info, file, args.augment)
    print(f"plot of {split} trial {row}: {file}")
    return 0


def split_summary(trials: "Dataset") -> dict[str, Any]:
    """Count a split: rows, hours, seconds (median, least, most), sessions, texts, words."""
    import numpy as np

    from b2t.data.dataset import durations
    from b2t.data.trials import values_of

    seconds = durations(trials)
    texts = [text for text in values_of(trials, "text") if text is not None]
    phonemes = [ids for ids in values_of(trials, "phonemes") if ids]
    return {
        "rows": len(trials),
        "hours": float(seconds.sum() / 3600),
        "seconds": (float(np.median(seconds)), float(seconds.min()), float(seconds.max())),
        "sessions": Counter(values_of(trials, "session")),
        "groups": _groups(trials),
        "texts": texts,
        "words": Counter(word for text in texts for word in words(text)),
        "phonemes": sum(map(len, phonemes)),
    }


def _groups(trials: "Dataset") -> dict[str, set[Any]]:
    """Return what trials belong to, by its kind."""
    from b2t.data.trials import values_of

    sessions = values_of(trials, "session")
    return {
        "sessions": set(sessions),
        "blocks": set(zip(sessions, values_of(trials, "block"), strict=True)),
        "subjects": set(values_of(trials, "subject")),
    }


def words(text: str) -> list[str]:
    """Split a text into lower-case words without punctuation at their ends."""
    stripped = (word.strip('.,;:!?"“”„()[]…–—').lower() for word in text.split())
    return [word for word in stripped if word]


def find_row(trials: "Dataset", row: str) -> int:
    """Return the position of ``row``, a position or a name ``session/block/trial``."""
    from b2t.data.trials import row_ids

    names = row_ids(trials)
    if row in names:
        return names.index(row)
    try:
        position = int(row)
        if 0 <= position < len(names):
            return position
    except ValueError:
        pass
    raise UserError(
        f"--row {row}: no such trial in this split; it has {len(names)}, from 0 or {names[0]} to "
        f"{len(names) - 1} or {names[-1]}"
    )


def _print(info: "DatasetInfo", splits: dict[str, "Dataset"], path: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    simulated = "   SIMULATION" if info.simulated else ""
    console.print(f"[bold]{escape(path)}[/bold]{simulated}")
    console.print(
        f"{counted(info.channels, 'channel')} at {info.sampling_rate:g} Hz, "
        f"fingerprint {info.fingerprint}\n"
    )
    summaries = {split: split_summary(trials) for split, trials in splits.items()}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for split in summaries:
        table.add_column(split, justify="right")
    for heading, *cells in zip(*_cells(summaries), strict=True):
        table.add_row(heading, *cells)
    console.print(table)
    for line in _remarks(info, summaries):
        console.print(line, markup=False)


def _cells(summaries: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the column of headings, then one column per split."""
    columns = [
        [
            "trials",
            "hours",
            "seconds per trial, median",
            "seconds per trial, range",
            "sessions",
            "texts",
            "different texts",
            "words",
            "vocabulary",
            "phonemes",
        ]
    ]
    for found in summaries.values():
        median, least, most = found["seconds"]
        columns.append(
            [
                f"{found['rows']:,}",
                f"{found['hours']:.2f}",
                f"{median:.2f}",
                f"{least:.2f}–{most:.2f}",
                f"{len(found['sessions']):,}",
                f"{len(found['texts']):,}",
                f"{len(set(found['texts'])):,}",
                f"{sum(found['words'].values()):,}",
                f"{len(found['words']):,}",
                f"{found['phonemes']:,}",
            ]
        )
    return columns


def _remarks(info: "DatasetInfo", summaries: dict[str, dict[str, Any]]) -> list[str]:
    lines = [""]
    train = next(iter(summaries.values()))
    sessions = train["sessions"].most_common()
    shown = ", ".join(f"{name} ({count:,})" for name, count in sorted(sessions[:6]))
    more = f" and {len(sessions) - 6} more" if len(sessions) > 6 else ""
    lines.append(f"sessions to train on: {shown}{more}")
    if train["words"]:
        common = ", ".join(word for word, _ in train["words"].most_common(10))
        lines.append(f"most frequent words: {common}")
    elif not info.has_text:
        lines.append("no text: good for training a tokenizer, not a text decoder")
    for split, found in list(summaries.items())[1:]:
        if found["texts"] and train["texts"]:
            known = sum(text in set(train["texts"]) for text in set(found["texts"]))
            unknown = sum(word not in train["words"] for word in found["words"])
            lines.append(
                f"{split}: {known} of {len(set(found['texts']))} different texts occur in "
                f"training; {unknown} of {len(found['words'])} words do not"
            )
        elif train["texts"]:
            lines.append(f"{split}: no texts")
        shared = [
            f"{len(groups & train['groups'][kind])} of {len(groups)} {kind}"
            for kind, groups in found["groups"].items()
        ]
        lines.append(f"{split}: {', '.join(shared)} occur in training")
    return lines


def _plot_augmented(
    trials: "Dataset", row: int, info: "DatasetInfo", file: Path, given: list[str]
) -> None:
    import yaml

    from b2t.data.augment_figure import plot_augmented
    from b2t.data.options import AugmentOptions
    from b2t.data.ramps import ramps_of
    from b2t.data.trials import read_signal, row_id
    from b2t.options import checked

    options = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or key not in AugmentOptions.model_fields:
            raise UserError(
                f"--augment {item}: expected KEY=VALUE with a key of data.augment: "
                f"{', '.join(AugmentOptions.model_fields)}"
            )
        options[key] = yaml.safe_load(value)
    try:
        ramps = ramps_of(options)
    except ValueError as error:
        raise UserError(f"--augment {error}") from None
    ends = {**options, **{key: ramp.last for key, ramp in ramps.items()}}
    augment = checked(AugmentOptions, ends, "--augment").at_rate(info.sampling_rate)
    record = trials.select_columns(["session", "block", "trial"]).with_format(None)[row]
    signal = read_signal(trials.with_format("arrow")[row])
    plot_augmented(file, signal, info.sampling_rate, augment, row_id(record), ramps)


def _require_place(file: Path) -> None:
    from b2t.records import require_writable

    if file.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {file}: expected a name ending in .png, .pdf or .svg")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--plot {file}: no folder {file.absolute().parent}")
    require_writable(file.absolute().parent, "--plot")


def _plot(trials: "Dataset", row: int, info: "DatasetInfo", file: Path) -> None:
    from b2t.data.trial_plot import plot_trial
    from b2t.data.trials import read_signal, row_id

    record = trials.select_columns(["session", "block", "trial", "text"]).with_format(None)[row]
    signal = read_signal(trials.with_format("arrow")[row])
    name = row_id(record)
    facts = [
        name if record["text"] else "",
        f"{counted(len(signal), 'bin')}, {len(signal) / info.sampling_rate:.2f} s, "
        f"{counted(info.channels, 'channel')}",
        "SIMULATION" if info.simulated else "",
    ]
    plot_trial(
        file,
        signal,
        info.sampling_rate,
        title=f"“{record['text']}”" if record["text"] else name,
        subtitle="   ".join(fact for fact in facts if fact),
        channel_names=info.channel_names,
        unit="z-score" if info.z_scored else "recorded unit",
    )
