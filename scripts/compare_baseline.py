"""Train several settings for the same processor time, and compare them on the test split.

    python scripts/compare_baseline.py DATASET --out compare --minutes 12 \
      gru phonemes "phonemes model.quantizer.enabled=false"

A setting is a preset and what it overrides. A short run of each tells its processor time per step,
codebooks running; steps, warm-up, codebook start and validations are then scaled so that all train
for the same minutes on one thread. The model is the one that validation chose; a language model of
the training sentences, its weights tuned on the validation split for each, reads the words. What is
printed comes from the test split, which chose nothing; differences are to the first setting, with
a paired bootstrap over trials.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from b2t.evaluate import metrics

ROOT = Path(__file__).resolve().parents[1]
FEW, MORE = 8, 32
ONE_THREAD = {"OMP_NUM_THREADS": "1", "B2T_THREADS": "1"}
"""Training takes all cores unless told; threads that wait for each other count as time too."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="prepared folder with train, val and test splits")
    parser.add_argument("settings", nargs="+", help="a preset, and overrides in the same argument")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--minutes", type=float, default=12.0, help="processor minutes each (12)")
    parser.add_argument("--batch", type=int, default=16, help="trials per step (16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs (0)")
    parser.add_argument("--order", type=int, default=3, help="of the language model (3)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    engine = json.loads((ROOT / "ds_configs" / "zero2_cpu.json").read_text())
    engine["train_micro_batch_size_per_gpu"] = args.batch
    (args.out / "deepspeed.json").write_text(json.dumps(engine))
    results = []
    for number, setting in enumerate(args.settings):
        results.append(known_or_new(args, setting, args.out / f"{number}"))
    record = {"arguments": {k: str(v) for k, v in vars(args).items()}, "results": results}
    (args.out / "comparison.json").write_text(json.dumps(record, indent=1))
    print_table(results, args.out)


def known_or_new(args: argparse.Namespace, setting: str, folder: Path) -> dict:
    """Compare a setting, unless an earlier call of the same arguments has."""
    path = folder / "result.json"
    asked = {
        "dataset": args.dataset,
        "setting": setting,
        **{name: getattr(args, name) for name in ("minutes", "batch", "seed", "order")},
    }
    if path.is_file():
        record = json.loads(path.read_text())
        if record["asked"] == asked:
            print(f"{folder}: known from an earlier call")
            return record["result"]
    if folder.exists():
        shutil.rmtree(folder)  # an unfinished comparison: its run would go on, untimed
    result = compare_one(args, setting, folder)
    path.write_text(json.dumps({"asked": asked, "result": result}, indent=1))
    return result


def compare_one(args: argparse.Namespace, setting: str, folder: Path) -> dict:
    """Time, train and evaluate one setting."""
    # What is built once, as the optimizer's C++, must not count as a step.
    train(args, setting, folder / "first", 2, timing=True)
    step_s = (
        train(args, setting, folder / "long", MORE, timing=True)
        - train(args, setting, folder / "short", FEW, timing=True)
    ) / (MORE - FEW)
    steps = int(60 * args.minutes / step_s)
    spent = train(args, setting, folder / "run", steps)
    run, model = str(folder / "run"), str(folder / "lm")
    command("b2t.cli", "lm", args.dataset, "--out", model, "--order", args.order, "--tune", run)
    command("b2t.cli", "evaluate", run, "--lm", model, "--split", "test")
    found = json.loads((folder / "run" / "evaluation.json").read_text())
    curve = [
        [row["step"], row["val/per"] if "val/per" in row else row["val/loss"]]
        for row in map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        if "val/loss" in row
    ]
    keep = ("per", "wer_lm", "cer_lm")
    rates = {name: found[name] for name in keep}
    rates |= {f"{name}_interval": found[f"{name}_interval"] for name in keep}
    rates |= {f"{name}_noise": found[f"{name}_noise"] for name in keep}
    return {
        "setting": setting,
        "step_s": step_s,
        "steps": steps,
        "processor_minutes": spent / 60,
        "perplexity": found["perplexity"],
        "validation": curve,
        **rates,
        "wer_lm_shuffled": found["wer_lm_shuffled"],
    }


def train(
    args: argparse.Namespace, setting: str, run: Path, steps: int, timing: bool = False
) -> float:
    """Train for so many steps in all; return the processor seconds of it."""
    preset, *overrides = setting.split()
    phases = yaml.safe_load((ROOT / "b2t" / "presets" / f"{preset}.yaml").read_text())["phases"]
    scale = steps / sum(phase["steps"] for phase in phases)
    scaled = [f"run.dir={run}", f"data.path={args.dataset}", f"run.seed={args.seed}"]
    for number, phase in enumerate(phases):
        scaled.append(f"phases.{number}.steps={max(1, round(phase['steps'] * scale))}")
        warmup = round(phase.get("warmup_steps", 0) * scale)
        scaled.append(f"phases.{number}.warmup_steps={warmup}")
    every = steps + 1 if timing else max(1, steps // 8)
    scaled += [f"evaluation.every={every}", f"checkpoint.every={max(every, steps // 2)}"]
    scaled += [f"log.every={max(1, steps // 50)}", "evaluation.decode_trials=0"]
    started = min(2, steps - 1) if timing else round(0.15 * steps)
    scaled.append(f"codebook_start.after_steps={started}")
    if timing:
        scaled.append("evaluation.max_trials=4")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command(
        "train_ds",
        "--deepspeed_config",
        args.out / "deepspeed.json",
        "--config",
        preset,
        *scaled,
        *overrides,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def command(module: str, *arguments: object) -> None:
    """Run a module of the repository on one thread of the CPU."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", **ONE_THREAD}
    line = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(line, cwd=ROOT, env=environment, check=True)


def edits(folder: Path) -> dict[str, metrics.EditCounts]:
    """Edits of each test trial, in the order of the rows."""
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    texts = [metrics.normalise_text(row["target"]) for row in rows]
    said = [metrics.normalise_text(row["lm_prediction"]) for row in rows]
    phonemes = [row["target_phonemes"] for row in rows]
    return {
        "per": metrics.count_phoneme_edits(phonemes, [row["phonemes"] for row in rows]),
        "wer_lm": metrics.count_edits(texts, said, "word"),
    }


def paired(one: metrics.EditCounts, other: metrics.EditCounts) -> tuple[float, float, float]:
    """Ratio of two pooled rates and its 95 % interval, the same trials drawn for both."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(one.edits), (2000, len(one.edits)))
    ratios = other.edits[drawn].sum(1) / np.maximum(one.edits[drawn].sum(1), 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(other.edits.sum() / max(one.edits.sum(), 1)), float(low), float(high)


def print_table(results: list[dict], out: Path) -> None:
    """Print the rates on the test split, and ratios to the first setting."""
    first = edits(out / "0" / "run")
    print(
        "\n| setting | minutes | steps | PER | on noise | WER by LM | on noise | PER, WER / first |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for number, found in enumerate(results):
        own = edits(out / str(number) / "run")
        cells = [f"{found['setting']}", f"{found['processor_minutes']:.1f}", f"{found['steps']}"]
        for name in ("per", "wer_lm"):
            low, high = found[f"{name}_interval"]
            cells.append(f"{100 * found[name]:.1f} % ({100 * low:.1f}–{100 * high:.1f})")
            cells.append(f"{100 * found[f'{name}_noise']:.0f} %")
        ratios = [paired(first[name], own[name]) for name in ("per", "wer_lm")]
        cells.append(", ".join(f"{r:.2f} ({low:.2f}–{high:.2f})" for r, low, high in ratios))
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
