"""ZuCo 1.0 and 2.0: EEG of reading, MATLAB files ``resultsXXX_TASK.mat`` (version 5 or 7.3).

``sentenceData`` holds one struct per sentence with ``content``, ``rawData`` [105, samples] at
500 Hz and ``word``, one struct per word with band features such as ``GD_t1`` [105] over its
fixations. A trial is a sentence: by ``--level words`` (the default) a sequence of its fixated
words, each with the eight bands of ``--signal GD`` (gaze duration; also TRT, FFD), by ``--level
sentences`` its EEG.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from b2t.data.remarks import Remarks
from b2t.data.sources.base import SourceOptions, TrialInfo, require_rate
from b2t.data.sources.matlab import MatFile, Struct, text
from b2t.data.sources.parts import PartsSource, choose_channels
from b2t.data.sources.recording import WholeTrials
from b2t.errors import UserError

NAME = "zuco"
READS = "ZuCo 1 and 2 (resultsXXX_SR.mat; --level words|sentences)"
OPTIONS = frozenset({"channels", "signal", "level"})
SAMPLING_RATE = 500.0
WORD_RATE = 1.0
"""Of a sequence of words, whose bins are words and no time: nominal."""
BANDS = ("t1", "t2", "a1", "a2", "b1", "b2", "g1", "g2")
MEASURES = ("GD", "TRT", "FFD")
LEVELS = ("words", "sentences")
_FILE = re.compile(r"results([A-Z]{3})_([A-Z]+)\.mat")


def find(path: Path) -> list[Path]:
    """Return the files of subjects at ``path``."""
    candidates = [path] if path.is_file() else sorted(path.rglob("results*.mat"))
    return [file for file in candidates if file.is_file() and _FILE.fullmatch(file.name)]


def open_source(path: Path, files: list[Path], options: SourceOptions) -> PartsSource:
    """Open all subjects."""
    measure = options.signal or MEASURES[0]
    if measure not in MEASURES:
        raise UserError(f"--signal {measure}: ZuCo's words have {', '.join(MEASURES)}")
    if options.level not in LEVELS:
        raise UserError(f"--level {options.level}: expected {' or '.join(LEVELS)}")
    if options.signal and options.level == "sentences":
        raise UserError("--signal chooses a measure of words: leave it out with --level sentences")
    words = options.level == "words"
    if words and options.resample:
        raise UserError(
            "--resample: the bins of --level words are words, not time; --level sentences resamples"
        )
    require_rate(SAMPLING_RATE, options.resample, path)
    remarks = Remarks()
    latest = lru_cache(maxsize=1)(_sentences)
    parts = [_open(file, latest, measure if words else None, options, remarks) for file in files]
    return PartsSource(NAME, path, parts, options, remarks)


def _sentences(file: Path) -> list[Struct]:
    found = MatFile(file)["sentenceData"]
    if not isinstance(found, list) or not all(isinstance(item, Struct) for item in found):
        raise UserError(f"{file}: sentenceData is no array of structs: is this a file of ZuCo?")
    return found


def _open(
    file: Path, latest: Any, measure: str | None, options: SourceOptions, remarks: Remarks
) -> WholeTrials:
    matched = _FILE.fullmatch(file.name)
    assert matched is not None
    subject, task = matched.groups()
    kept: list[int] = []
    trials = []
    electrodes = 0
    for index, sentence in enumerate(latest(file)):
        name = f"{file}, sentence {index}"
        signal = _signal(sentence, measure, name)
        if signal is None:
            what = "no word with a fixation" if measure else "no EEG"
            remarks.add(f"left out: {what} was recorded", name, "sentence")
            continue
        electrodes = electrodes or signal.shape[1]
        kept.append(index)
        trials.append(
            TrialInfo(
                name=name,
                session=f"{subject}_{task}",
                subject=subject,
                block=0,
                trial=index,
                text=text(sentence["content"]) if "content" in sentence else None,
            )
        )
    names = _channels(electrodes, measure)
    picks = choose_channels(names, options.channels, file)

    def load(index: int) -> np.ndarray:
        signal = _signal(latest(file)[kept[index]], measure, trials[index].name)
        assert signal is not None
        return signal[:, picks]

    return WholeTrials(
        file=file,
        session=f"{subject}_{task}",
        channels=[names[pick] for pick in picks],
        sampling_rate=WORD_RATE if measure else SAMPLING_RATE,
        trials=trials,
        load=load,
        resample=options.resample,
        lack=f"{file} holds no sentence with a signal",
    )


def _channels(width: int, measure: str | None) -> list[str]:
    if measure is None:
        return [f"E{index + 1}" for index in range(width)]
    electrodes = width // len(BANDS)
    return [f"{measure}_{band}-E{index + 1}" for band in BANDS for index in range(electrodes)]


def _signal(sentence: Struct, measure: str | None, name: str) -> np.ndarray | None:
    """Return words × (bands × electrodes), or samples × electrodes; None where there is nothing."""
    if measure is None:
        raw = _table(sentence["rawData"]) if "rawData" in sentence else None
        return None if raw is None or raw.ndim != 2 or raw.shape[1] < 2 else raw.T
    words = sentence.get("word")
    rows = [
        row
        for word in (words if isinstance(words, list) else [])
        if isinstance(word, Struct) and (row := _bands(word, measure)) is not None
    ]
    if not rows:
        return None
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise UserError(f"{name}: its words have between {min(widths)} and {max(widths)} features")
    return np.stack(rows)


def _bands(word: Struct, measure: str) -> np.ndarray | None:
    """Return the eight bands [8 × electrodes] of one word, None where it was not looked at."""
    found = [
        _table(word[f"{measure}_{band}"]) if f"{measure}_{band}" in word else None for band in BANDS
    ]
    vectors = [vector.flatten() for vector in found if vector is not None and vector.size > 1]
    if len(vectors) < len(BANDS) or not all(np.isfinite(vector).all() for vector in vectors):
        return None
    return np.concatenate(vectors).astype(np.float32)


def _table(value: Any) -> np.ndarray | None:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu" or not value.size:
        return None
    return value.astype(np.float32)
