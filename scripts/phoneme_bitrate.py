"""What do codes cost in phonemes, and what would close it? PER over bits per second.

Each point trains the preset `phonemes` with other overrides for the same number of steps on one
thread, and is scored on the validation and the test split by the command line's own programs. A
point is one line of a JSONL file; what the file already holds is not run again:

    python scripts/phoneme_bitrate.py DATASET --points none 4x256 1x256
    python scripts/phoneme_bitrate.py --report            # table and figure to docs/

Bits per second are frames per second × the sum over layers of log2 K (as stored) and of log2 of
the perplexity on the test split (about what an entropy coder of each layer alone would need).
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ONE_THREAD = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "B2T_THREADS": "1"}
os.environ.update(ONE_THREAD)

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from bitrate.points import POINTS  # noqa: E402
from bitrate.report import write_report  # noqa: E402

from b2t import cli  # noqa: E402
from b2t.train import main as training  # noqa: E402

WARMUP, START = 0.05, 0.15
"""Parts of the steps until the learning rate is full and until codes are used."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", nargs="?", help="prepared folder with train, val and test")
    parser.add_argument("--points", nargs="+", choices=POINTS, default=["none"], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--steps", type=int, default=500, help="of 16 trials (500)")
    parser.add_argument("--batch", type=int, default=16, help="trials per step (16)")
    parser.add_argument(
        "--start", type=Path, help="run without a quantizer that all points start from, as trained"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="greatest learning rate (2e-3)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bitrate")
    parser.add_argument("--report", action="store_true", help="write docs/ and run nothing")
    args = parser.parse_args(arguments)
    if not args.report and args.dataset is None:
        parser.error("a prepared dataset is needed")
    return args


def load_lines(path: Path) -> list[dict[str, Any]]:
    """Finished points."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def perform(args: argparse.Namespace) -> None:
    """Run what is not in the file yet, seeds outermost."""
    args.out.mkdir(parents=True, exist_ok=True)
    engine = json.loads((ROOT / "ds_configs" / "zero2_cpu.json").read_text())
    engine["train_micro_batch_size_per_gpu"] = args.batch
    (args.out / "deepspeed.json").write_text(json.dumps(engine))
    path = args.out / "points.jsonl"
    done = [line["plan"] for line in load_lines(path)]
    for seed in args.seeds:
        for name in args.points:
            plan = plan_of(args, name, seed)
            if plan in done:
                continue
            result = run(args, plan)
            with path.open("a") as file:
                file.write(json.dumps({"plan": plan, "result": result}) + "\n")
            print(name, seed, json.dumps(result), flush=True)


def plan_of(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Everything that defines a point."""
    return {
        "data": Path(args.dataset).name,
        "point": name,
        "overrides": POINTS[name],
        "seed": seed,
        "steps": args.steps,
        "batch": args.batch,
        "lr": args.lr,
        "start": None if args.start is None else args.start.name,
    }


def run(args: argparse.Namespace, plan: dict[str, Any]) -> dict[str, Any]:
    """Train and score one point."""
    folder = args.out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    steps = plan["steps"]
    start = [] if args.start is None else [f"model.init_from={args.start}"]
    begin = 0 if start else round(START * steps)
    began = spent()
    command(
        training.main,
        "--deepspeed_config",
        args.out / "deepspeed.json",
        "--config",
        "phonemes",
        f"run.dir={folder}",
        f"run.seed={plan['seed']}",
        f"data.path={args.dataset}",
        f"phases.0.steps={steps}",
        f"phases.0.warmup_steps={round(WARMUP * steps)}",
        f"phases.0.lr={plan['lr']}",
        f"codebook_start.after_steps={begin}",
        f"evaluation.every={steps}",
        f"checkpoint.every={steps}",
        f"log.every={max(1, steps // 10)}",
        "evaluation.decode_trials=0",
        "log.report=false",
        *start,
        *plan["overrides"],
    )
    result: dict[str, Any] = {"minutes": (spent() - began) / 60}
    for split in ("val", "test"):
        scores = folder / split
        scores.mkdir()
        command(cli.main, "evaluate", folder, "--split", split, "--out", scores, "--no-noise")
        found = json.loads((scores / "evaluation.json").read_text())
        result[f"per_{split}"] = found["per"]
    settings = json.loads((folder / "checkpoints" / "best" / "config.json").read_text())
    frames = frames_per_second(settings)
    return result | {
        "per_interval": found["per_interval"],
        "utilization": found["utilization"],
        **rates(frames, found["perplexity"], settings["quantizer"]),
    }


def rates(frames: float, perplexity: list[float], quantizer: dict[str, Any]) -> dict[str, Any]:
    """Bits per second as stored and by entropy; nothing for latents that are not coded."""
    if not perplexity:
        return {"bits": None, "bits_entropy": None}
    layer = math.log2(quantizer["codebook_size"])
    return {
        "bits": frames * layer * len(perplexity),
        "bits_entropy": frames * sum(math.log2(p) for p in perplexity),
    }


def frames_per_second(settings: dict[str, Any]) -> float:
    """Latent frames per second of a saved model's signals."""
    return float(settings["sampling_rate"]) / settings["encoder"]["patch_stride"]


def command(program: Callable[[list[str]], int], *arguments: object) -> None:
    """Run a program in a child of its own, which shares what this process has imported."""
    line = list(map(str, arguments))
    child = multiprocessing.get_context("fork").Process(target=_quietly, args=(program, line))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{program.__module__} {' '.join(line)}: exit status {child.exitcode}")


def _quietly(program: Callable[[list[str]], int], line: list[str]) -> None:
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())
        sys.exit(program(line))


def spent() -> float:
    """Processor seconds of finished children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.report:
        write_report(load_lines(args.out / "points.jsonl"), ROOT / "docs")
    else:
        perform(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
