"""Train several settings for the same processor time, and compare them on a held-out split.

    python scripts/compare_baseline.py DATASET --out compare/1 --minutes 12 gru phonemes
    python scripts/compare_baseline.py --summary compare/1 compare/2 compare/3 --figure curves.png

A setting is a preset and what it overrides, in one argument; `minutes=3` and `batch=64` among the
overrides are its own, as for a text decoder on top of a model that has had its time
("words minutes=3 batch=64 model.init_from=compare/1/1/run"). Phases share the time in proportion to
their steps in the preset; warm-up and the start of codebooks stay the preset's. All train on one
thread, and only processor time counts, validations included: the phase's `minutes`. The model is
the one that validation chose, by its words where it writes any, else by its phonemes; words are
read by a lexicon of the training sentences alone, and by it with their language model, the weights
of both tuned on the validation split for each. What is printed comes from the test split, which
chose nothing, or from ``--split``, as for ablations on data that report nothing else; ratios are to
the first setting, with a paired bootstrap over trials, those of all folders pooled. A call that was
cut off goes on where it was: settings that it had finished are known, the run of another keeps its
time.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from b2t.evaluate import metrics
from b2t.evaluate.controls import shuffled

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "B2T_THREADS": "1"}
"""Training takes all cores unless told; threads that wait for each other count as time too."""
MOST_STEPS = 10
"""A phase ends by its minutes; it has so many times its preset's steps at most."""
RATES = {
    "per": ("phonemes", "target_phonemes", "phoneme"),
    "wer_lm": ("lm_prediction", "target", "word"),
    "wer_lexicon": ("lexicon_prediction", "target", "word"),
    "wer": ("prediction", "target", "word"),
}
"""Rate, and where the predictions hold what was said and what should have been."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", nargs="?", help="prepared folder with train, val, test splits")
    parser.add_argument("settings", nargs="*", help="a preset, and overrides in the same argument")
    parser.add_argument("--out", type=Path, help="folder for runs and results")
    parser.add_argument("--minutes", type=float, default=12.0, help="processor minutes each (12)")
    parser.add_argument("--batch", type=int, default=16, help="trials per step (16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs (0)")
    parser.add_argument("--order", type=int, default=3, help="of the language model (3)")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="score text decoders alone, without lexicon and n-grams",
    )
    parser.add_argument("--split", default="test", help="split to compare on (test)")
    parser.add_argument("--tune-trials", type=int, help="tune decoders on so many trials (all)")
    parser.add_argument("--every", type=int, default=200, help="steps between validations (200)")
    parser.add_argument(
        "--only", type=int, nargs="+", help="numbers of the settings to train now, from 0 (all)"
    )
    parser.add_argument("--summary", type=Path, nargs="+", help="OUT folders of earlier calls")
    parser.add_argument("--figure", type=Path, help="PNG of the learning curves to write")
    args = parser.parse_intermixed_args()
    folders = args.summary or [args.out]
    if args.summary is None:
        if args.dataset is None or not args.settings or args.out is None:
            parser.error("name a dataset, --out and at least one setting; or --summary OUT …")
        if not compare(args):
            return
    results = [json.loads((f / "comparison.json").read_text())["results"] for f in folders]
    print_tables(results, folders)
    draw_curves(results, args.figure or folders[0] / "curves.png")


def compare(args: argparse.Namespace) -> bool:
    """Train and evaluate what an earlier call has not; tell whether all settings are known."""
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = range(len(args.settings)) if args.only is None else args.only
    found = {n: known_or_new(args, args.settings[n], args.out / f"{n}") for n in chosen}
    if len(found) < len(args.settings):
        return False
    results = [found[number] for number in sorted(found)]
    record = {"arguments": {k: str(v) for k, v in vars(args).items()}, "results": results}
    (args.out / "comparison.json").write_text(json.dumps(record, indent=1))
    return True


def known_or_new(args: argparse.Namespace, setting: str, folder: Path) -> dict:
    """Compare a setting, unless an earlier call of the same arguments has."""
    path = folder / "result.json"
    names = ("minutes", "batch", "seed", "order", "every")
    asked = {
        "dataset": args.dataset,
        "setting": setting,
        **{name: getattr(args, name) for name in names},
        **({"alone": True} if args.alone else {}),
        **({} if args.split == "test" else {"split": args.split}),
    }
    if path.is_file():
        record = json.loads(path.read_text())
        if record["asked"] == asked:
            print(f"{folder}: known from an earlier call")
            return record["result"]
    begun = folder / "asked.json"
    if folder.exists() and not (begun.is_file() and json.loads(begun.read_text()) == asked):
        shutil.rmtree(folder)  # the run of other arguments would go on
    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(asked))
    result = compare_one(args, setting, folder)
    path.write_text(json.dumps({"asked": asked, "result": result}, indent=1))
    return result


def compare_one(args: argparse.Namespace, setting: str, folder: Path) -> dict:
    """Train and evaluate one setting."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = folder / "run"
    engine = json.loads((ROOT / "ds_configs" / "zero2_cpu.json").read_text())
    engine["train_micro_batch_size_per_gpu"] = int(own(setting, "batch", args.batch))
    (folder / "deepspeed.json").write_text(json.dumps(engine))
    overrides = training(args, setting, run)
    status = run / "status.json"
    if not (status.is_file() and json.loads(status.read_text())["state"] == "finished"):
        command("train_ds", "--deepspeed_config", folder / "deepspeed.json", *overrides)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {}
    readers = {"lexicon": ["--lexicon-only"], "lm": ["--order", args.order]}
    # White noise and other trials' signals are the controls that the tables show.
    how = ["--split", args.split, "--controls"]
    if args.alone:
        readers = {}
        out = folder / "by_lm"
        command("b2t.cli", "evaluate", run, "--out", out, *how)
        found = json.loads((out / "evaluation.json").read_text())
    for name, options in readers.items():
        model, out = folder / name, folder / f"by_{name}"
        if args.tune_trials is not None:
            options = [*options, "--limit", args.tune_trials]
        command("b2t.cli", "lm", args.dataset, "--out", model, *options, "--tune", run)
        command("b2t.cli", "evaluate", run, "--lm", model, "--out", out, *how)
        one = json.loads((out / "evaluation.json").read_text())
        found |= {key.replace("_lm", f"_{name}"): value for key, value in one.items()}
    return {
        "setting": setting,
        "minutes": own(setting, "minutes", args.minutes),
        "process_minutes": (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        / 60,
        "steps": last_step(run),
        "perplexity": found["perplexity"],
        "validation": validation_curve(run),
        **{
            key: found.get(key)
            for name in RATES
            for key in (name, f"{name}_interval", f"{name}_noise", f"{name}_shuffled")
        },
    }


def own(setting: str, name: str, otherwise: float) -> float:
    """Number that a setting has of its own."""
    given = [word for word in setting.split() if word.startswith(f"{name}=")]
    return float(given[-1].removeprefix(f"{name}=")) if given else otherwise


def training(args: argparse.Namespace, setting: str, run: Path) -> list[str]:
    """Arguments of the training of a setting: phases with minutes, validations that decode."""
    preset, *words = setting.split()
    minutes = own(setting, "minutes", args.minutes)
    overrides = [word for word in words if not word.startswith(("minutes=", "batch="))]
    known = yaml.safe_load((ROOT / "b2t" / "presets" / f"{preset}.yaml").read_text())
    phases, speaks = known["phases"], known["model"]["text_decoder"].get("enabled", True)
    total = sum(phase["steps"] for phase in phases)
    given = ["--config", preset, f"run.dir={run}", f"data.path={args.dataset}"]
    given += [f"run.seed={args.seed}", "log.report=false"]
    for number, phase in enumerate(phases):
        given.append(f"phases.{number}.steps={MOST_STEPS * phase['steps']}")
        given.append(f"phases.{number}.minutes={minutes * phase['steps'] / total:g}")
        given.append(f"phases.{number}.minutes_of=processor")
    given += [f"evaluation.every={args.every}", f"evaluation.decode_every={args.every}"]
    given.append(f"checkpoint.best_metric={'val/wer' if speaks else 'val/per'}")
    return [*given, *overrides]


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_step(run: Path) -> int:
    """Applied steps of a run."""
    return max(row["step"] for row in rows_of(run))


def validation_curve(run: Path) -> list[dict[str, float]]:
    """Step and validation rates of every validation."""
    names = ("val/loss", "val/per", "val/wer")
    merged: dict[int, dict[str, float]] = {}
    for row in rows_of(run):
        kept = {name: row[name] for name in names if name in row}
        if kept:
            merged.setdefault(row["step"], {"step": row["step"]}).update(kept)
    return [merged[step] for step in sorted(merged)]


def command(module: str, *arguments: object) -> None:
    """Run a module of the repository on one thread of the CPU."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", **ONE_THREAD}
    line = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(line, cwd=ROOT, env=environment, check=True)


def predictions(folder: Path) -> list[dict[str, Any]]:
    """Predictions of each test trial, in the order of the rows, by all decoders."""
    rows, lexicon = (
        [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        for path in (folder / f"by_{name}" / "predictions.jsonl" for name in ("lm", "lexicon"))
    )
    for row, other in zip(rows, lexicon, strict=bool(lexicon)):
        row["lexicon_prediction"] = other.get("lm_prediction")
    return rows


def edits(rows: list[dict[str, Any]], mixed: bool = False) -> dict[str, metrics.EditCounts]:
    """Edits of each trial by rate; ``mixed``: against what was said of another trial."""
    found = {}
    for name, (said_in, target_in, unit) in RATES.items():
        if any(row.get(said_in) is None or row.get(target_in) is None for row in rows):
            continue
        said = [row[said_in] for row in rows]
        said = shuffled(said) if mixed else said
        targets = [row[target_in] for row in rows]
        if unit == "phoneme":
            found[name] = metrics.count_phoneme_edits(targets, said)
        else:
            plain = [[metrics.normalise_text(text) for text in texts] for texts in (targets, said)]
            found[name] = metrics.count_edits(*plain, "word")
    return found


def pooled(parts: list[metrics.EditCounts]) -> metrics.EditCounts:
    """Edits of the trials of several folders as one."""
    return metrics.EditCounts(
        np.concatenate([p.edits for p in parts]), np.concatenate([p.lengths for p in parts])
    )


def paired(one: metrics.EditCounts, other: metrics.EditCounts) -> tuple[float, float, float]:
    """Ratio of two pooled rates and its 95 % interval, the same trials drawn for both."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(one.edits), (2000, len(one.edits)))
    ratios = other.edits[drawn].sum(1) / np.maximum(one.edits[drawn].sum(1), 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(other.edits.sum() / max(one.edits.sum(), 1)), float(low), float(high)


def print_tables(results: list[list[dict]], folders: list[Path]) -> None:
    """Print rates and controls of each folder, and of all pooled with ratios to the first."""
    print("\n| folder | setting | minutes | steps | rate | held out | 95 % | on noise | shuffled |")
    print("|---|---|---|---|---|---|---|---|---|")
    counts: list[list[dict[str, metrics.EditCounts]]] = []
    for folder, found in zip(folders, results, strict=True):
        counts.append([])
        for number, result in enumerate(found):
            rows = predictions(folder / str(number))
            counts[-1].append(edits(rows))
            mixed = edits(rows, mixed=True)
            for name, own in counts[-1][-1].items():
                cells = [folder.name, result["setting"], f"{result['minutes']:g}"]
                cells += [str(result["steps"]), name, percent(own.rate())]
                cells.append("–".join(percent(end, "") for end in own.interval() or (None, None)))
                cells += [percent(result.get(f"{name}_noise")), percent(mixed[name].rate())]
                print("| " + " | ".join(cells) + " |")
    print("\n| setting | rate | mean of folders | pooled, 95 % | ratio to the first, 95 % |")
    print("|---|---|---|---|---|")
    for number, result in enumerate(results[0]):
        for name in counts[0][number]:
            parts = [found[number][name] for found in counts]
            whole = pooled(parts)
            low, high = whole.interval() or (None, None)
            mean = float(np.mean([part.rate() for part in parts]))
            cells = [result["setting"], name, percent(mean)]
            cells.append(f"{percent(whole.rate())} ({percent(low, '')}–{percent(high, '')})")
            cells.append(ratio_to_first(counts, number, name))
            print("| " + " | ".join(cells) + " |")


def ratio_to_first(
    counts: list[list[dict[str, metrics.EditCounts]]], number: int, name: str
) -> str:
    """Ratio of a rate to that of the first setting; its words are those by language model."""
    if name not in counts[0][0]:
        return "–"
    first = pooled([found[0][name] for found in counts])
    ratio, low, high = paired(first, pooled([found[number][name] for found in counts]))
    return f"{ratio:.2f} ({low:.2f}–{high:.2f})"


def percent(rate: float | None, unit: str = " %") -> str:
    return "–" if rate is None else f"{100 * rate:.1f}{unit}"


def draw_curves(results: list[list[dict]], path: Path) -> None:
    """Draw the validation rates over the minutes, one line per folder and setting."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    settings = [result["setting"] for result in results[0]]
    shown = [n for n in ("val/per", "val/wer") if any(n in row for row in every_row(results))]
    figure, axes = pyplot.subplots(
        1, len(shown), figsize=(5 * len(shown), 3.4), squeeze=False, layout="constrained"
    )
    for place, name in zip(axes[0], shown, strict=True):
        for number, setting in enumerate(settings):
            for index, found in enumerate(results):
                result = found[number]
                rows = [row for row in result["validation"] if name in row]
                share = result["minutes"] / max(result["steps"], 1)
                label = setting.split()[0] if index == 0 and rows else None
                place.plot(
                    [row["step"] * share for row in rows],
                    [100 * row[name] for row in rows],
                    marker="o", ms=3, lw=1.2, color=f"C{number}", label=label,
                )  # fmt: skip
        place.set_ylabel(f"{name.removeprefix('val/').upper()} on validation trials (%)")
        place.set_xlabel("processor minutes")
        place.set_ylim(bottom=0)
        place.spines[["top", "right"]].set_visible(False)
        place.grid(axis="y", lw=0.5, alpha=0.6)
        place.legend(frameon=False)
    figure.savefig(path, dpi=110)
    print(f"\n{path}")


def every_row(results: list[list[dict]]) -> list[dict]:
    return [row for found in results for result in found for row in result["validation"]]


if __name__ == "__main__":
    main()
