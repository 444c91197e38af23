"""A source into an Arrow dataset with splits, one trial in memory at a time."""

import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, disable_progress_bars
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from b2t.data import checksums
from b2t.data.checksums import row_checksum
from b2t.data.phonemes import PHONEMES
from b2t.data.sources import Source, SourceOptions
from b2t.data.sources.base import SPLITS
from b2t.data.trial_checks import TrialChecks
from b2t.data.trials import Fingerprint, require_finite, row_id, trial_features
from b2t.errors import UserError
from b2t.log import logger
from b2t.signal_spec import Z_SCORE

RECORD = "b2t.json"
VERSION = 1


@dataclass(frozen=True)
class PrepareOptions:
    """How to prepare trials.

    Attributes:
        normalize: ``block`` z-scores each channel over its session and block (recording), by
            statistics of the whole block, held-out trials included, as T15 was; ``none`` keeps
            the source's unit; ``auto`` is ``block`` unless the source is z-scored already.
        fractions: shares of train, val and test, where the source has no splits of its own.
        disjoint_text: no text of one split occurs in another.
        skip_bad_trials: leave out trials that are empty, hold NaN or occur twice, instead of
            stopping.
        seed: of the random split.
        overwrite: replace an earlier prepared dataset.
    """

    normalize: str = "auto"
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    disjoint_text: bool = False
    skip_bad_trials: bool = False
    seed: int = 0
    overwrite: bool = False


def prepare(
    source: Source,
    out: str | Path,
    options: PrepareOptions,
    *,
    record: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``source`` to ``out`` as a ``DatasetDict`` with ``b2t.json`` beside it.

    Args:
        source: an opened source (`b2t.data.sources.detect`).
        out: a folder that does not exist yet, or an earlier result to overwrite.
        options: normalisation and splits.
        record: further entries of ``b2t.json``, such as where the data came from.

    Returns:
        The content of ``b2t.json``.

    Raises:
        UserError: ``out`` exists, a split would be empty, or a trial is empty, holds NaN or occurs
            twice.
    """
    out = Path(out)
    _require_free(out, options.overwrite)
    splits = assign_splits(source, options)
    _require_filled(source, splits, options)
    trials = _Trials(source, options, splits)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        written = _write(trials, splits, partial)
        content = _content(source, options, written, trials, record or {})
        _save(written, partial / "dataset", content)
        if out.exists():
            shutil.rmtree(out)
        (partial / "dataset").rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        source.remarks.say()
    if trials.skipped:
        logger(__name__).warning(
            "left out %d bad trials, the first: %s", len(trials.skipped), trials.skipped[0]
        )
    return content


def assign_splits(source: Source, options: PrepareOptions) -> list[str]:
    """Return the split of every trial of ``source``.

    A source's own splits are kept. Other trials are shared out at random, a function of the seed
    and of their number; with ``disjoint_text``, trials of one text go together.
    """
    splits = [info.split for info in source.trials]
    free = [index for index, split in enumerate(splits) if split is None]
    groups: dict[str, list[int]] = defaultdict(list)
    for index in free:
        text = source.trials[index].text
        together = options.disjoint_text and text is not None
        groups[_text_key(str(text)) if together else f"\0{index}"].append(index)
    names = list(groups)
    missing = {
        split: share * len(free) for split, share in zip(SPLITS, options.fractions, strict=True)
    }
    for position in np.random.default_rng(options.seed).permutation(len(names)):
        split = max(missing, key=missing.__getitem__)
        for index in groups[names[position]]:
            splits[index] = split
            missing[split] -= 1
    return [str(split) for split in splits]


@dataclass
class _Moments:
    """Mean and sum of squared deviations [C] of the bins seen so far."""

    bins: int = 0
    mean: Any = 0.0
    squares: Any = 0.0

    def add(self, signal: np.ndarray) -> None:
        """Merge ``signal`` [T, C] (Chan, Golub and LeVeque 1979: no cancellation)."""
        bins, mean = len(signal), signal.mean(axis=0, dtype=np.float64)
        squares = ((signal - mean) ** 2).sum(axis=0, dtype=np.float64)
        total = self.bins + bins
        self.squares = self.squares + squares + (mean - self.mean) ** 2 * self.bins * bins / total
        self.mean = self.mean + (mean - self.mean) * bins / total
        self.bins = total

    def deviation(self) -> np.ndarray:
        """Return the standard deviation [C], 1 for a channel that never moves."""
        deviation = np.sqrt(self.squares / self.bins)
        return np.where(deviation > 1e-6 * np.abs(self.mean), deviation, 1.0)


class _Trials:
    """Reads trials, refuses or skips bad ones, z-scores by block."""

    def __init__(self, source: Source, options: PrepareOptions, splits: Sequence[str]) -> None:
        self.source = source
        self.splits = splits
        self.skip = options.skip_bad_trials
        self.skipped: list[str] = []
        standardize = options.normalize == "block" or (
            options.normalize == "auto" and not source.standardized
        )
        self.normalization = "block" if standardize else "none"
        self._moments: dict[tuple[str, int], _Moments] = defaultdict(_Moments)
        if standardize:
            for index, signal in self._read("measuring blocks"):
                self._moments[self._block(index)].add(signal)
            self._say_flat()

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each trial's index and its signal [T, C] float32."""
        for index, signal in self._read("writing trials"):
            moments = self._moments.get(self._block(index))
            if moments is not None:
                signal = (signal - moments.mean) / moments.deviation()
            yield index, np.ascontiguousarray(signal, dtype=np.float32)

    def _read(self, what: str) -> Iterator[tuple[int, np.ndarray]]:
        self.skipped = []
        checks = TrialChecks(self.source.remarks, z_scored=self.source.standardized)
        for index in tqdm(range(len(self.source.trials)), desc=what, unit="trial", disable=None):
            signal = self.source.read(index)
            info = self.source.trials[index]
            try:
                require_finite(signal, info.name)
                checks.look(signal, row_id(vars(info)), info.name, self.splits[index])
            except UserError as error:
                if not self.skip:
                    raise
                self.skipped.append(str(error))
                continue
            yield index, signal

    def _block(self, index: int) -> tuple[str, int]:
        info = self.source.trials[index]
        return info.session, info.block

    def _say_flat(self) -> None:
        for (session, block), moments in self._moments.items():
            still = np.flatnonzero(moments.squares == 0)
            if len(still):
                names = ", ".join(self.source.channels[index] for index in still[:5])
                logger(__name__).warning(
                    "%s, block %d: %d channels never move (%s%s): they become 0",
                    session,
                    block,
                    len(still),
                    names,
                    " …" if len(still) > 5 else "",
                )


@dataclass
class _Written:
    """Splits as written, the fingerprint of their content, the checksum of every row."""

    datasets: dict[str, Dataset]
    fingerprint: str
    checksums: dict[str, list[int]]


def _write(trials: _Trials, splits: Sequence[str], folder: Path) -> _Written:
    source = trials.source
    features = trial_features(len(source.channels))
    writers: dict[str, ArrowWriter] = {}
    marks = {split: Fingerprint() for split in SPLITS}
    sums: dict[str, list[int]] = {split: [] for split in SPLITS}
    for index, signal in trials:
        split = splits[index]
        if split not in writers:
            path = str(folder / f"{split}.arrow")
            writers[split] = ArrowWriter(features=features, path=path, writer_batch_size=16)
        row = _row(source, index, split)
        marks[split].add(row, signal)
        sums[split].append(row_checksum(row, signal))
        writers[split].write({"signal": signal, **row})
    for writer in writers.values():
        writer.finalize()
    if "train" not in writers:
        raise UserError("no trial is left for training: every one is bad")
    digest = combined_fingerprint({split: marks[split].hexdigest() for split in writers})
    found = {split: str(folder / f"{split}.arrow") for split in SPLITS if split in writers}
    return _Written(
        {split: Dataset.from_file(path) for split, path in found.items()},
        digest,
        {split: sums[split] for split in found},
    )


def combined_fingerprint(splits: dict[str, str]) -> str:
    """Join the fingerprints of splits into that of a dataset."""
    return "-".join(splits[split][:12] for split in sorted(splits))


def _row(source: Source, index: int, split: str) -> dict[str, Any]:
    info = source.trials[index]
    return {
        "text": info.text,
        "phonemes": None if info.phonemes is None else list(info.phonemes),
        "session": info.session,
        "subject": info.subject,
        "block": info.block,
        "trial": info.trial,
        "sampling_rate": source.sampling_rate,
        "split": split,
    }


def _content(
    source: Source,
    options: PrepareOptions,
    written: _Written,
    trials: _Trials,
    record: dict[str, Any],
) -> dict[str, Any]:
    z_scored = source.standardized or trials.normalization == "block"
    return {
        "version": VERSION,
        "format": source.format,
        "simulated": source.simulated,
        "fingerprint": written.fingerprint,
        "normalization": trials.normalization,
        "z_scored": z_scored,
        "unit": Z_SCORE if z_scored else source.unit,
        "sampling_rate": source.sampling_rate,
        "channels": source.channels,
        "phonemes": list(PHONEMES) if any(info.phonemes for info in source.trials) else None,
        "rows": {split: len(dataset) for split, dataset in written.datasets.items()},
        "skipped": len(trials.skipped),
        "options": asdict(options),
        **record,
    }


def _save(written: _Written, folder: Path, content: dict[str, Any]) -> None:
    disable_progress_bars()
    DatasetDict(written.datasets).save_to_disk(str(folder))
    content["arrow"] = {split: arrow_state(folder / split) for split in written.datasets}
    content["checksums"] = checksums.FILE
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / RECORD).write_text(text, "utf-8")
    checksums.save(folder, written.checksums, text)


def arrow_state(folder: Path) -> str:
    """Return datasets' own mark of a saved split, which any later change of it renews."""
    return str(json.loads((folder / "state.json").read_text())["_fingerprint"])


def _require_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    ours = (out / RECORD).exists()
    if not overwrite or not ours:
        raise UserError(
            f"{out} exists: "
            + ("replace it with --overwrite, or " if ours else "it is no prepared dataset; ")
            + "choose another name"
        )


def _require_filled(source: Source, splits: Sequence[str], options: PrepareOptions) -> None:
    counts = Counter(splits)
    if source.own_splits and any(info.split for info in source.trials):
        wanted = ["train"]
    else:
        wanted = [split for split, share in zip(SPLITS, options.fractions, strict=True) if share]
    empty = [split for split in wanted if not counts[split]]
    if empty:
        first = f"; the first is {source.trials[0].name}" if source.trials else ""
        raise UserError(
            f"the {empty[0]} split would be empty ({len(splits)} trials{first}: "
            f"{', '.join(f'{split} {counts[split]}' for split in SPLITS)}): give it a larger share "
            "with --split, cut shorter windows with --window, or bring more data"
        )


def _text_key(text: str) -> str:
    return re.sub(r"\s+", " ", text.strip().lower())


def source_options(options: PrepareOptions, **fields: Any) -> SourceOptions:
    """Return the options of a source that go with ``options``."""
    return SourceOptions(fractions=options.fractions, **fields)
