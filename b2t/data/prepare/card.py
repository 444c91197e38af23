"""The card of a prepared dataset: what it holds, in words and a picture, for whoever finds it."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_from_disk

from b2t.counted import counted
from b2t.data.phonemes import words_of
from b2t.data.trials import read_signal, row_id, signal_lengths, spread_over_sessions

FILE = "README.md"
PICTURE = "trials.png"
_SHOWN = 3
_NAMED = 12


def write_card(folder: Path, name: str, content: dict[str, Any], licence: str | None) -> None:
    """Write ``README.md`` and ``trials.png`` into a prepared folder.

    Args:
        folder: the prepared dataset.
        name: what it is called.
        content: of `b2t.json`.
        licence: of the recordings, None where it was not given.
    """
    splits = {split: load_from_disk(str(folder / split)) for split in content["rows"]}
    _draw(folder / PICTURE, splits["train"], content)
    channels = content["channels"]
    lines = [
        f"# {name}",
        "",
        "SIMULATED recordings, not of a brain." if content["simulated"] else "",
        f"Licence of the recordings: {licence or 'not stated; ask where they came from'}.",
        f"Read as {content['format']}: {counted(len(channels), 'channel')} at "
        f"{content['sampling_rate']:g} Hz,"
        f" unit {content['unit'] or 'unknown'}, stored as {content['dtype']}.",
        "",
        "| split | trials | hours | sessions | subjects | texts | words | vocabulary |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(split, rows) for split, rows in splits.items()),
        "",
        f"Channels: {', '.join(channels[:_NAMED])}{' …' if len(channels) > _NAMED else ''}.",
        f"Fingerprint of the content: `{content['fingerprint']}`; a checksum of every trial in "
        "`checksums.npz` (`b2t inspect FOLDER --verify` compares them).",
        "",
        f"![three trials]({PICTURE})",
        "",
    ]
    (folder / FILE).write_text("\n".join(lines), "utf-8")


def _row(split: str, rows: Dataset) -> str:
    columns = rows.select_columns(["text", "session", "subject", "sampling_rate"])
    table = columns.with_format("arrow")[:].to_pydict()
    texts = [text for text in table["text"] if text]
    words = [word for text in texts for word in words_of(text)]
    hours = float(np.sum(signal_lengths(rows) / np.asarray(table["sampling_rate"]))) / 3600
    cells = [
        split, f"{len(rows):,}", f"{hours:.2f}", len(set(table["session"])),
        len(set(table["subject"])), f"{len(texts):,}", f"{len(words):,}", f"{len(set(words)):,}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _draw(path: Path, rows: Dataset, content: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = spread_over_sessions(rows, _SHOWN)
    # Places by hand and few dots: a layout that is found takes longer than reading 500 trials.
    figure = Figure(figsize=(11, 3 * len(chosen)), dpi=80, facecolor="white")
    figure.subplots_adjust(left=0.06, right=0.99, top=0.96, bottom=0.07, hspace=0.3)
    FigureCanvasAgg(figure)
    table = rows.with_format("arrow")
    for axes, index in zip(
        figure.subplots(len(chosen), 1, squeeze=False)[:, 0], chosen, strict=True
    ):
        row = table[index]
        signal = read_signal(row)
        limit = float(np.quantile(np.abs(signal), 0.99)) or 1.0
        seconds = len(signal) / content["sampling_rate"]
        axes.imshow(
            signal.T, aspect="auto", interpolation="nearest", cmap="RdBu_r",
            vmin=-limit, vmax=limit, extent=(0, seconds, signal.shape[1], 0),
        )  # fmt: skip
        named = {key: row[key][0].as_py() for key in ("session", "block", "trial")}
        text = row["text"][0].as_py()
        axes.set_title(f"{text or 'no text'}  ({row_id(named)})", fontsize=9, loc="left")
        axes.set_ylabel("channel", fontsize=8)
    axes.set_xlabel("time (s)")
    figure.savefig(path, pil_kwargs={"compress_level": 1})
