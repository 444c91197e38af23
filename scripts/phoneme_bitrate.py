"""What do codes cost in phonemes, and what closes it? PER over bits per second.

Starts from a run of the preset `phonemes` without a quantizer. Each point gives a copy of its model
another quantizer, started on its latents (k-means++), and trains both on for the same few steps, as
the trainer would with codes from the first of them; or not at all (``--steps 0``: what codes cost a
finished model). A point is one line of a JSONL file; what the file holds is not run again:

    python train_ds.py --config phonemes data.path=DATASET run.dir=RUN \\
        model.quantizer.enabled=false phases.0.losses.commitment=0
    python scripts/phoneme_bitrate.py RUN --steps 0 --points 1x256 2x256 4x256 8x256
    python scripts/phoneme_bitrate.py RUN --points none 4x256 commitment-1
    python scripts/phoneme_bitrate.py --report            # table and figure to docs/

Bits per second are frames per second × the sum over layers of log2 K, as stored, and of log2 of the
perplexity on the test split, about what a coder of each layer's entropy would need.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from bitrate.points import POINTS  # noqa: E402
from bitrate.report import write_report  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, help="run without a quantizer")
    parser.add_argument("--data", help="dataset (default: the run's data.path)")
    parser.add_argument("--points", nargs="+", choices=POINTS, default=["none"], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--steps", type=int, default=40, help="to train on for (40)")
    parser.add_argument("--batch", type=int, default=16, help="trials per step (16)")
    parser.add_argument("--lr", type=float, default=5e-4, help="at the first step (5e-4)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bitrate" / "points.jsonl")
    parser.add_argument("--report", action="store_true", help="write docs/ and run nothing")
    args = parser.parse_args(arguments)
    if not args.report and args.run is None:
        parser.error("a run is needed")
    return args


def load_lines(path: Path) -> list[dict[str, Any]]:
    """Finished points."""
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )


def perform(args: argparse.Namespace) -> None:
    """Run what is not in the file yet, seeds outermost."""
    from bitrate.bench import Bench

    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [line["plan"] for line in load_lines(args.out)]
    bench = None
    for seed in args.seeds:
        for name in args.points:
            plan = {
                "point": name,
                **POINTS[name],
                **{key: getattr(args, key) for key in ("steps", "batch", "lr")},
                "seed": seed,
            }
            if plan in done:
                continue
            bench = bench or Bench(args.run, args.data)
            began = time.process_time()
            result = bench.measured(plan)
            result["processor_s"] = time.process_time() - began
            with args.out.open("a") as file:
                file.write(json.dumps({"plan": plan, "result": result}) + "\n")
            print(name, f"steps {args.steps} seed {seed}", json.dumps(result), flush=True)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.report:
        write_report(load_lines(args.out), ROOT / "docs")
    else:
        perform(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
