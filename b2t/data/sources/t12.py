"""Brain-to-Text '24 (participant T12): MATLAB, one file per session and split.

The layout is that of the public release: ``train``, ``test`` and ``competitionHoldOut`` hold
``t12.2022.MM.DD.mat`` with cells ``tx1`` and ``spikePow`` [T, 256], rows of ``sentenceText`` and
``blockIdx``, 20 ms bins. Its test split has sentences and is read as val, its hold-out as test.
Columns 0 to 127 are area 6v, 128 to 255 area 44. Peers use 6v alone, and so do we unless
``--channels`` says otherwise (``--channels "*"`` reads both areas).
"""

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from b2t.data.phonemes import sentence_to_ids, unpronounceable
from b2t.data.remarks import Remarks
from b2t.data.sources.base import SourceOptions, TrialInfo, require_plausible_size, require_rate
from b2t.data.sources.matlab import MatFile, numbers
from b2t.data.sources.parts import PartsSource, choose_channels
from b2t.data.sources.recording import WholeTrials
from b2t.errors import UserError

NAME = "t12"
READS = "Brain-to-Text '24 MATLAB (train/t12.YYYY.MM.DD.mat)"
OPTIONS = frozenset({"channels"})
SAMPLING_RATE = 50.0
FEATURES = {"tx1": "crossings", "spikePow": "power"}
SPLIT_NAMES = {"train": "train", "test": "val", "competitionHoldOut": "test"}
_FILE = re.compile(r"t12\.\d{4}\.\d{2}\.\d{2}\.mat")
_MOST_BLOCKS = 2**31
_AREA = 128
"""Columns of one area."""

_Cells = dict[str, list[np.ndarray]]
_Load = Callable[[Path], _Cells]


def find(path: Path) -> list[Path]:
    """Return the release's files below ``path``, or the one file that ``path`` is."""
    candidates = [path] if path.is_file() else sorted(path.rglob("t12.*.mat"))
    return [file for file in candidates if file.is_file() and _FILE.fullmatch(file.name)]


def open_source(path: Path, files: list[Path], options: SourceOptions) -> PartsSource:
    """Open the release."""
    require_rate(SAMPLING_RATE, options.resample, path)
    remarks = Remarks()
    latest = lru_cache(maxsize=1)(_cells)
    parts = [_open(file, latest, options, remarks) for file in files]
    own = any(file.parent.name in SPLIT_NAMES for file in files)
    return PartsSource(NAME, path, parts, options, remarks, own_splits=own)


def channel_names(columns: int) -> list[str]:
    """Name the channels of both features by area and column: crossings first, then power."""
    areas = ["6v", "44"] if columns == 2 * _AREA else ["6v"]
    if columns not in (_AREA, 2 * _AREA):
        return [f"{kind}-{column}" for kind in FEATURES.values() for column in range(columns)]
    return [
        f"{kind}-{area}-{column}"
        for kind in FEATURES.values()
        for area in areas
        for column in range(_AREA)
    ]


def phonemes_of(text: str | None, name: str, remarks: Remarks) -> tuple[int, ...] | None:
    """Return the classes of a sentence by the CMU dictionary; None, with a remark, beyond it."""
    if text is None:
        return None
    if unpronounceable([text]):
        remarks.add(
            "without phonemes: a word of its sentence is not in the CMU dictionary", name, "trial"
        )
        return None
    return tuple(sentence_to_ids(text)) or None


def _open(file: Path, load: _Load, options: SourceOptions, remarks: Remarks) -> WholeTrials:
    content = MatFile(file)
    cells = load(file)
    count = len(cells["tx1"])
    texts = _sentences(content)
    blocks = numbers(content["blockIdx"], f"{file}, blockIdx").flatten()
    if not count == len(cells["spikePow"]) == len(blocks) == len(texts or blocks):
        raise UserError(
            f"{file}: {count} trials of tx1, {len(cells['spikePow'])} of spikePow, {len(blocks)} "
            f"of blockIdx, {len(texts)} of sentenceText: expected the same number of each; the "
            "file is damaged"
        )
    if not (np.abs(blocks) < _MOST_BLOCKS).all():  # nor NaN
        raise UserError(f"{file}, blockIdx holds {blocks.max():g}, where numbers of blocks belong")
    session = file.stem
    trials = []
    for index in range(count):
        name = f"{file}, trial {index}"
        text = texts[index].strip() or None if texts else None
        trials.append(
            TrialInfo(
                name=name,
                session=session,
                subject="t12",
                block=int(blocks[index]),
                trial=index,
                text=text,
                phonemes=phonemes_of(text, name, remarks),
                split=SPLIT_NAMES.get(file.parent.name),
            )
        )
    columns = _signal(cells, 0, f"{file}, trial 0").shape[1] // 2 if count else 2 * _AREA
    names = channel_names(columns)
    wanted = options.channels or (("*-6v-*",) if names[0].startswith("crossings-6v") else None)
    picks = choose_channels(names, wanted, file)
    return WholeTrials(
        file=file,
        session=f"{file.parent.name}/{session}",
        channels=[names[pick] for pick in picks],
        sampling_rate=SAMPLING_RATE,
        trials=trials,
        load=lambda index: _signal(load(file), index, f"{file}, trial {index}")[:, picks],
        resample=options.resample,
        lack=f"{file} holds no trial",
    )


def _cells(file: Path) -> _Cells:
    """Return both features of all trials of one file."""
    content = MatFile(file)
    found: _Cells = {}
    for name in FEATURES:
        cells = content[name]
        if not isinstance(cells, list):
            raise UserError(
                f"{file}, {name} is no cell array: expected a cell per trial, as in the release"
            )
        found[name] = [
            numbers(cell, f"{file}, {name}, trial {index}") for index, cell in enumerate(cells)
        ]
    return found


def _signal(cells: _Cells, index: int, name: str) -> np.ndarray:
    """Return both features [T, 2 × columns] of one trial."""
    both = [cells[feature][index] for feature in FEATURES]
    if any(part.ndim != 2 for part in both) or both[0].shape != both[1].shape:
        raise UserError(
            f"{name}: tx1 has shape {list(both[0].shape)} and spikePow {list(both[1].shape)}, "
            "where the same [bins, columns] are expected"
        )
    require_plausible_size(len(both[0]), 2 * both[0].shape[1], name)
    return np.concatenate(both, 1).astype(np.float32)


def _sentences(content: MatFile) -> list[str]:
    """Return the sentences, none where they are held out."""
    if "sentenceText" not in content:
        return []
    rows = content["sentenceText"]
    if not isinstance(rows, list):
        return []
    # Rows of a table of characters, or a cell per sentence.
    return [row[0] if isinstance(row, list) and row else str(row or "") for row in rows]
