"""``b2t simulate``: write simulated recordings, or compare the simulation with a real one."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from b2t.arguments import finite, seed
from b2t.counted import counted
from b2t.errors import UserError
from b2t.records import require_writable

SUMMARY = "write simulated recordings of attempted speech in the Brain-to-Text '25 layout"

_EPILOG = """
The simulation stands in for real recordings where there are none: to try the whole pipeline, to
test a change, to compare settings. Results on it say nothing about decoding a brain. A user of the
real release changes only the path.

examples:
  b2t simulate data/simulated
      4 sessions, 2,000/200/200 trials, 256 electrodes (512 features), 50 words
  b2t simulate data/small --electrodes 64 --select-from 256 --trials 400 40 40
      a small array of well-tuned electrodes, decodable in minutes on a CPU
  b2t simulate data/large --vocabulary 1000 --sessions 45 --trials 8000 1400 1400 --jobs 16
      as large as the real release
  b2t simulate data/everyday --vocabulary everyday
      sentences as people say them, 450 words, no grammar; --sentences FILE takes yours instead
  b2t simulate data/hard --setting hard --seed 1
      the setting of comparisons (docs/RESULTS.md); options beside it change it
  b2t simulate --compare t15.2023.08.13/data_train.hdf5
      firing rates, Fano factor, autocorrelation … of a real recording beside the simulation's
"""

_DEFAULTS: dict[str, Any] = {
    "trials": (2000, 200, 200),
    "electrodes": 256,
    "vocabulary": 50,
    "tuning": 1.0,
    "noise": 1.0,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    # Half the calibrated information of an electrode and twice its noise: the field's GRU, trained
    # for 12 minutes on one thread, had phoneme error rates of 15 to 20 % (docs/RESULTS.md).
    "hard": {
        "trials": (1500, 150, 150),
        "electrodes": 64,
        "vocabulary": "everyday",
        "tuning": 0.7,
        "noise": 2.0,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``b2t simulate``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="folder to write to")
    hard = " ".join(f"--{name} {_text(value)}" for name, value in _SETTINGS["hard"].items())
    parser.add_argument(
        "--setting",
        choices=sorted(_SETTINGS),
        help=f"several options at once; hard: {hard} (single options go before it)",
    )
    _add_size(parser)
    _add_speech(parser)
    _add_activity(parser)
    _add_running(parser)


def _add_size(parser: argparse.ArgumentParser) -> None:
    size = parser.add_argument_group("size")
    size.add_argument("--sessions", type=int, default=4, help="recording days (default: 4)")
    size.add_argument(
        "--trials",
        type=int,
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        help="trials of each split over all sessions (default: 2000 200 200)",
    )
    size.add_argument(
        "--electrodes",
        type=int,
        help="electrodes; each gives two features, crossings and power (default: 256)",
    )
    size.add_argument(
        "--select-from",
        type=int,
        metavar="N",
        help="draw N electrodes and record the best tuned, as if a good site had been found; more "
        "decodable than the trial that the simulation is calibrated on (default: no selection)",
    )
    size.add_argument(
        "--block-trials", type=int, default=50, metavar="N", help="trials in a block (default: 50)"
    )


def _add_speech(parser: argparse.ArgumentParser) -> None:
    speech = parser.add_argument_group("speech")
    source = speech.add_mutually_exclusive_group()
    source.add_argument(
        "--vocabulary",
        type=_vocabulary,
        metavar="50|1000|everyday",
        help="sentences of a grammar of 50 or 1,000 words, or everyday English that follows no "
        "grammar (default: 50)",
    )
    source.add_argument(
        "--sentences",
        type=Path,
        metavar="FILE",
        help="draw from the sentences of a text file, one per line; each is used once at most",
    )
    speech.add_argument(
        "--speaking-rate",
        type=finite,
        default=60.0,
        metavar="WPM",
        help="attempted words a minute at ordinary word length (default: 60; the participant of "
        "T15 attempts about 30)",
    )
    speech.add_argument(
        "--variability",
        type=finite,
        default=0.05,
        metavar="X",
        help="variation of articulator targets, which span -1 to 1, between attempts at the same "
        "phone (default: 0.05)",
    )
    speech.add_argument(
        "--unlabelled-test",
        action="store_true",
        help="leave the test split without labels, as the real release does",
    )


def _add_activity(parser: argparse.ArgumentParser) -> None:
    activity = parser.add_argument_group("activity (1 = calibrated on a real trial)")
    activity.add_argument(
        "--tuning", type=finite, metavar="X", help="strength of tuning (default: 1)"
    )
    activity.add_argument(
        "--noise",
        type=finite,
        metavar="X",
        help="noise that electrodes share (default: 1)",
    )
    activity.add_argument(
        "--drift",
        type=finite,
        default=1.0,
        metavar="X",
        help="speed at which tuning changes between sessions, 0 = not at all (default: 1)",
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    running = parser.add_argument_group("running")
    running.add_argument("--seed", type=seed, default=0, help="same seed, same bytes (default: 0)")
    running.add_argument(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="processes; the result does not depend on it (default: all cores)",
    )
    running.add_argument(
        "--force", action="store_true", help="replace an earlier simulation in OUT"
    )
    running.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="write nothing; print the statistics of a real recording (.hdf5 of T15, or .npy) "
        "beside the simulation's at as many electrodes and bins",
    )


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _vocabulary(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def run(args: argparse.Namespace) -> int:
    """Simulate, or compare."""
    if args.compare is not None:
        return _compare(args)
    if args.out is None:
        raise UserError("name the folder to write to: b2t simulate OUT (see b2t simulate --help)")
    return _simulate(args)


def _simulate(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from b2t.data.sentence_source import SentenceList, load_source
    from b2t.data.simulate import simulate

    config = _config(args)
    require_writable(args.out, "OUT")
    source = load_source(config.vocabulary)
    if isinstance(source, SentenceList) and source.repeated:
        total = len(source.texts) + source.repeated
        print(
            f"{source.name}: {total} sentences, {source.repeated} dropped (words of an earlier one)"
        )
    with tqdm(total=sum(config.trials), unit="trial", desc="simulating", smoothing=0.05) as bar:
        folder = simulate(
            config, args.out, jobs=_jobs(args.jobs), force=args.force, progress=bar.update
        )
    train, val, test = config.trials
    print(
        f"simulated {counted(config.sessions, 'session')}: {train} train, {val} val, "
        f"{test} test trials of {2 * config.electrodes} features, seed {config.seed}\n{folder}"
    )
    return 0


def _compare(args: argparse.Namespace) -> int:
    from b2t.data.calibration import compare, load_recording, table

    recording = load_recording(args.compare)
    bins, electrodes = recording.crossings.shape
    print(f"{args.compare}: {electrodes} electrodes, {bins} bins; beside it simulated recordings")
    print(table(compare(recording, _config(args))))
    print("rate and Fano factor are nan where the crossings' levels do not tell counts")
    return 0


def _config(args: argparse.Namespace):
    from b2t.data.population import PopulationConfig
    from b2t.data.simulate import SimulationConfig

    if args.drift < 0:
        raise UserError(f"--drift {args.drift}: must not be negative")
    still = PopulationConfig()
    population = replace(
        still,
        tuning=_chosen(args, "tuning"),
        noise=_chosen(args, "noise"),
        drift_per_day=still.drift_per_day * args.drift,
        session_spread=still.session_spread * args.drift,
        gain_spread=still.gain_spread * args.drift,
    )
    return SimulationConfig(
        sessions=args.sessions,
        trials=tuple(_chosen(args, "trials")),
        electrodes=_chosen(args, "electrodes"),
        select_from=args.select_from,
        vocabulary=_source(args),
        seed=args.seed,
        speaking_rate=args.speaking_rate,
        variability=args.variability,
        block_trials=args.block_trials,
        labelled_test=not args.unlabelled_test,
        population=population,
    )


def _source(args: argparse.Namespace) -> int | str | Path:
    if args.sentences is not None:
        return args.sentences
    return _chosen(args, "vocabulary")


def _chosen(args: argparse.Namespace, name: str) -> Any:
    """Value of an option: its own, else the setting's, else the default."""
    # No defaults in argparse: one equal to the value given would hide that it was.
    given = getattr(args, name)
    return {**_DEFAULTS, **_SETTINGS.get(args.setting, {})}[name] if given is None else given


def _jobs(asked: int) -> int:
    return asked or os.cpu_count() or 1
