"""Simulated recordings of attempted speech in the layout of the Brain-to-Text '25 release.

Written are ``<out>/hdf5_data_final/t15.YYYY.MM.DD/data_{train,val,test}.hdf5`` and, beside them,
``<out>/simulation.json`` with every parameter. Sentences come from `b2t.data.sentence_source`,
their movements from `b2t.data.articulation`, the neural activity from `b2t.data.population`. Every
file carries the attribute ``simulated``.
"""

import json
import multiprocessing
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np

from b2t import __version__
from b2t.data.articulation import BIN_SECONDS, Utterance, movements, time_sentence
from b2t.data.interrupts import left_to_this_process
from b2t.data.population import (
    ARRAYS,
    Population,
    PopulationConfig,
    best_tuned,
    crossings,
    draw_population,
    drift,
    log_rates,
    regressors,
    spike_power,
)
from b2t.data.sentence_source import LABEL_LENGTH, load_source
from b2t.errors import UserError

SPLITS = ("train", "val", "test")

_FOLDER = "hdf5_data_final"
_RECORD = "simulation.json"
_MOST_TRIALS = 1_000_000
_MOST_ELECTRODES = 2**16
_FIRST_DAY = date(2023, 8, 11)
_DAYS_BETWEEN = (2, 5, 7)
_REFERENCE_SENTENCES = 64
# Streams of random numbers, so that no part of a simulation shares draws with another.
_SENTENCES, _REFERENCE, _POPULATION, _DRIFT, _TIMING, _ACTIVITY = range(6)


@dataclass(frozen=True)
class SimulationConfig:
    """What to simulate.

    Attributes:
        sessions: recording days.
        trials: trials of the train, val and test split, over all sessions.
        electrodes: electrodes; each gives two features (crossings, power). A multiple of 4.
        select_from: draw so many electrodes and record the best tuned; None = draw `electrodes`.
        vocabulary: 50 or 1000 words, "everyday", or a file with one sentence per line.
        seed: seed of everything random.
        speaking_rate: attempted words a minute, at the word length of ordinary English.
        variability: standard deviation of articulator targets between attempts at a phone.
        block_trials: trials in a block; features are z-scored within a block.
        labelled_test: write the labels of the test split (the real release withholds them).
        population: statistics of the neural activity.
    """

    sessions: int = 4
    trials: tuple[int, int, int] = (2000, 200, 200)
    electrodes: int = 256
    select_from: int | None = None
    vocabulary: int | str | Path = 50
    seed: int = 0
    speaking_rate: float = 60.0
    variability: float = 0.05
    block_trials: int = 50
    labelled_test: bool = True
    population: PopulationConfig = field(default_factory=PopulationConfig)

    def __post_init__(self) -> None:
        problems = [message for wrong, message in self._checks() if wrong]
        if problems:
            raise UserError("cannot simulate: " + "; ".join(problems))

    def _checks(self) -> list[tuple[bool, str]]:
        drawn = self.electrodes if self.select_from is None else self.select_from
        arrays = len(ARRAYS)
        # Comparisons are written so that NaN fails.
        return [
            (self.sessions < 1, f"{self.sessions} sessions, at least 1 is needed"),
            (min(self.trials) < 1, f"trials {self.trials}, each split needs at least 1"),
            (
                sum(self.trials) > _MOST_TRIALS,
                f"trials {self.trials}, more than {_MOST_TRIALS} altogether",
            ),
            (
                self.trials[0] < self.sessions,
                f"{self.trials[0]} training trials for {self.sessions} sessions, "
                "each session needs at least 1",
            ),
            (
                self.electrodes < arrays or self.electrodes % arrays != 0,
                f"{self.electrodes} electrodes, a multiple of {arrays} is needed ({arrays} arrays)",
            ),
            (
                drawn < self.electrodes or drawn % arrays != 0,
                f"cannot select {self.electrodes} electrodes from {drawn}, "
                f"a multiple of {arrays} not below {self.electrodes} is needed",
            ),
            (drawn > _MOST_ELECTRODES, f"{drawn} electrodes, more than {_MOST_ELECTRODES}"),
            (self.block_trials < 1, f"{self.block_trials} trials in a block, at least 1 is needed"),
            (self.seed < 0, f"seed {self.seed}, must not be negative"),
            _outside("speaking rate", self.speaking_rate, (1, 1000)),
            _outside("variability", self.variability, (0, 10)),
            _outside("tuning", self.population.tuning, (0, 100)),
            _outside("noise", self.population.noise, (0, 100)),
        ]

    def rng(self, *stream: int) -> np.random.Generator:
        """Random numbers of one part of the simulation, the same wherever it runs."""
        return np.random.default_rng([self.seed, *stream])


def _outside(name: str, value: float, limits: tuple[float, float]) -> tuple[bool, str]:
    low, high = limits
    wrong = not low <= value <= high
    return wrong, f"{name} {value}, expected {low} to {high}"


@dataclass(frozen=True)
class Block:
    """Trials recorded in one go.

    Attributes:
        session: index of the session.
        number: number of the block within the session, from 1.
        split: train, val or test.
        sentences: one per trial.
    """

    session: int
    number: int
    split: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class BlockRecording:
    """Simulated activity of a block, its trials end to end along the first axis.

    Attributes:
        utterances: timing of each trial.
        rates: expected crossings per bin, [ΣT, E].
        counts: crossings per bin, [ΣT, E].
        power: spike-band power, [ΣT, E].
    """

    utterances: list[Utterance]
    rates: np.ndarray
    counts: np.ndarray
    power: np.ndarray

    @property
    def ends(self) -> np.ndarray:
        """Bin at which each trial but the last ends."""
        return np.cumsum([utterance.length for utterance in self.utterances])[:-1]

    def features(self) -> list[np.ndarray]:
        """Features of each trial as the release holds them, [T, 2 E] float32.

        log(1 + x) of crossings and of power, z-scored over all bins of the block.
        """
        values = np.log1p(np.concatenate([self.counts, self.power], axis=1))
        return np.split(zscore(values).astype(np.float32), self.ends)


def zscore(values: np.ndarray) -> np.ndarray:
    """Values [T, C] with mean 0 and standard deviation 1 in each column; constant columns are 0."""
    centred = values - values.mean(axis=0)
    deviation = centred.std(axis=0)
    return centred / np.where(deviation > 0, deviation, 1.0)


class Simulator:
    """The participant: one population that drifts over the sessions of a configuration."""

    def __init__(self, config: SimulationConfig) -> None:
        self.config = config

    @cached_property
    def days(self) -> list[date]:
        """Dates of the sessions."""
        gaps = [_DAYS_BETWEEN[index % len(_DAYS_BETWEEN)] for index in range(self.config.sessions)]
        offsets = np.cumsum([0, *gaps[:-1]])
        return [_FIRST_DAY + timedelta(days=int(offset)) for offset in offsets]

    def session_name(self, session: int) -> str:
        """Name of a session, as in the release: ``t15.YYYY.MM.DD``."""
        return f"t15.{self.days[session]:%Y.%m.%d}"

    @cached_property
    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the regressors over reference sentences, each [X]."""
        rng = self.config.rng(_REFERENCE)
        source = load_source(self.config.vocabulary)
        texts = [source.draw(rng) for _ in range(_REFERENCE_SENTENCES)]
        timed = [time_sentence(text, self.config.speaking_rate, rng) for text in texts]
        moved = regressors(movements(timed, self.config.variability, rng))
        return moved.mean(axis=0), moved.std(axis=0)

    @cached_property
    def populations(self) -> list[Population]:
        """The electrodes in each session."""
        config = self.config.population
        drawn = self.config.select_from or self.config.electrodes
        size = len(self._scale[0])
        population = draw_population(config, drawn, size, self.config.rng(_POPULATION))
        sessions = [best_tuned(population, self.config.electrodes)]
        for index in range(1, self.config.sessions):
            days = (self.days[index] - self.days[index - 1]).days
            rng = self.config.rng(_DRIFT, index)
            sessions.append(drift(sessions[-1], days, config, rng))
        return sessions

    def record(self, block: Block) -> BlockRecording:
        """Simulate one block; the same whenever and wherever it is called."""
        config = self.config.population
        timing = self.config.rng(_TIMING, block.session, block.number)
        activity = self.config.rng(_ACTIVITY, block.session, block.number)
        rate = self.config.speaking_rate
        utterances = [time_sentence(text, rate, timing) for text in block.sentences]
        mean, deviation = self._scale
        moved = movements(utterances, self.config.variability, timing)
        movement = (regressors(moved) - mean) / deviation
        population = self.populations[block.session]
        log_rate, sources = log_rates(population, movement, config, activity)
        rates = np.exp(log_rate)
        counts = crossings(rates, activity)
        power = spike_power(counts, sources, population, config, activity)
        return BlockRecording(utterances, rates, counts, power)


def plan_blocks(config: SimulationConfig) -> list[Block]:
    """Divide different sentences over sessions, splits and blocks; no sentence comes twice."""
    source = load_source(config.vocabulary)
    texts = deque(source.draw_different(sum(config.trials), config.rng(_SENTENCES)))
    blocks = []
    for session in range(config.sessions):
        number = 0
        for split, total in zip(SPLITS, config.trials, strict=True):
            left = total // config.sessions + (session < total % config.sessions)
            while left:
                number += 1
                size = min(left, config.block_trials)
                sentences = tuple(texts.popleft() for _ in range(size))
                blocks.append(Block(session, number, split, sentences))
                left -= size
    return blocks


def simulate(
    config: SimulationConfig, out: Path | str, *, jobs: int = 1, force: bool = False, progress=None
) -> Path:
    """Simulate a data set and write it; the bytes do not depend on ``jobs``.

    Args:
        config: what to simulate.
        out: folder to write to, made where absent.
        jobs: processes that simulate side by side.
        force: replace an earlier simulation in ``out``. Nothing else is ever replaced.
        progress: called with the number of trials after each block.

    Returns:
        The folder ``<out>/hdf5_data_final``.

    Raises:
        UserError: ``out`` already holds data, or there are too few sentences.
    """
    if jobs < 1:
        raise UserError(f"cannot simulate with {jobs} jobs: at least 1 is needed")
    out = Path(out)
    _check_free(out, force)
    blocks = plan_blocks(config)
    jobs = min(jobs, len(blocks))
    partial = out / f"{_FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    simulator = Simulator(config)
    for block, (utterances, features) in zip(
        blocks, _recordings(simulator, blocks, jobs), strict=True
    ):
        _write_block(partial, simulator, block, utterances, features)
        if progress is not None:
            progress(len(utterances))
    shutil.rmtree(out / _FOLDER, ignore_errors=True)
    partial.rename(out / _FOLDER)
    (out / _RECORD).write_text(json.dumps(describe(simulator, blocks), indent=2) + "\n", "utf-8")
    return out / _FOLDER


def describe(simulator: Simulator, blocks: list[Block]) -> dict:
    """Every parameter of a simulation, as written to ``simulation.json``."""
    config = asdict(simulator.config)
    origin = load_source(simulator.config.vocabulary).origin()
    if isinstance(simulator.config.vocabulary, Path):
        # The folders of one machine say nothing on another.
        config["vocabulary"] = simulator.config.vocabulary.name
    return {
        "simulated": True,
        "generator": f"b2t simulate {__version__}",
        "config": config,
        **({"sentences": origin} if origin else {}),
        "bin_seconds": BIN_SECONDS,
        "transform": "log(1 + x) of crossings and of power, z-scored per block",
        "arrays": list(ARRAYS),
        "sessions": [simulator.session_name(index) for index in range(simulator.config.sessions)],
        "blocks": [
            {
                "session": simulator.session_name(block.session),
                "block": block.number,
                "split": block.split,
                "trials": len(block.sentences),
            }
            for block in blocks
        ],
    }


def _check_free(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder to write the simulation to")
    data, record = out / _FOLDER, out / _RECORD
    if not data.exists() and not record.exists():
        return
    if not record.exists():
        raise UserError(
            f"{data} exists and no {_RECORD} says that it is a simulation: "
            "it may be a real recording and is not replaced; choose another folder"
        )
    if not force:
        raise UserError(
            f"{out} already holds a simulation: choose another folder, or replace it with --force"
        )


_Simulated = tuple[list[Utterance], list[np.ndarray]]
_worker_simulator: Simulator | None = None


def _start_worker(config: SimulationConfig) -> None:
    global _worker_simulator
    _worker_simulator = Simulator(config)


def _work(block: Block) -> _Simulated:
    assert _worker_simulator is not None
    recording = _worker_simulator.record(block)
    return recording.utterances, recording.features()


def _recordings(simulator: Simulator, blocks: list[Block], jobs: int) -> Iterator[_Simulated]:
    """Simulated blocks in order, at most two per process waiting to be written."""
    if jobs == 1:
        for block in blocks:
            recording = simulator.record(block)
            yield recording.utterances, recording.features()
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (simulator.config,))
    try:
        waiting: deque = deque()
        for block in blocks:
            with left_to_this_process():
                waiting.append(pool.submit(_work, block))
            if len(waiting) > 2 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_block(
    folder: Path,
    simulator: Simulator,
    block: Block,
    utterances: list[Utterance],
    features: list[np.ndarray],
) -> None:
    """Append the trials of a block to its split's file."""
    config = simulator.config
    session = simulator.session_name(block.session)
    path = folder / session / f"data_{block.split}.hdf5"
    path.parent.mkdir(exist_ok=True)
    labelled = config.labelled_test or block.split != "test"
    with h5py.File(path, "a") as file:
        file.attrs["simulated"] = True
        file.attrs["generator"] = f"b2t simulate {__version__}"
        file.attrs["seed"] = config.seed
        first = len(file)
        for index, (utterance, signal) in enumerate(zip(utterances, features, strict=True)):
            trial = file.create_group(f"trial_{first + index:04d}")
            trial.create_dataset("input_features", data=signal)
            trial.attrs["n_time_steps"] = len(signal)
            trial.attrs["session"] = session
            trial.attrs["block_num"] = block.number
            trial.attrs["trial_num"] = index
            if labelled:
                _write_labels(trial, utterance)


def _write_labels(trial: h5py.Group, utterance: Utterance) -> None:
    trial.create_dataset("seq_class_ids", data=_padded(utterance.labels))
    trial.create_dataset("transcription", data=_padded(utterance.text.encode("ascii")))
    trial.attrs["seq_len"] = len(utterance.labels)
    trial.attrs["sentence_label"] = utterance.text


def _padded(values: tuple[int, ...] | bytes) -> np.ndarray:
    padded = np.zeros(LABEL_LENGTH, dtype=np.int32)
    padded[: len(values)] = list(values)
    return padded
