"""Does the quantizer collapse? One small autoencoder under many quantizers, on recordings.

Each run trains the same autoencoder with another quantizer (a condition) and is written as one line
of a JSONL file; what the file already holds is not run again, so the study can be run in pieces:

    python scripts/collapse_study.py --data feis --sizes 8x256 --conditions full naive vqp none
    python scripts/collapse_study.py --unseen-subjects --data feis p300_fif --autoencoders strided \
        --conditions default vqp-best
    python scripts/collapse_study.py --report            # tables and figure to docs/

Settings are searched on a validation part of the training epochs (``--search ours``, ``--search
vqp``; ``--on validation`` for any condition). Without it, runs train on all training epochs and are
measured on held-out ones. Times are processor time of one thread.

Conditions: full, the recipe; no-X, one of its features off; with-X, an option that it does not use,
to be compared with no-beam, the recipe with nearest codes; fast-decay, running averages at 0.95;
more-commitment, at 0.25; late-revival, of codes under 0.1 × uniform use; naive, a codebook loss on
uniform codes within ±1/K (van den Oord et al. 2017, as commonly written), naive-normal, running
averages with decay 0.99 on codes as nn.Embedding draws them, and naive-ema, the same on uniform
codes of Kaiming's bound, all three straight through and nothing else; vqp, vector-quantize-pytorch
at its defaults, vqp-best, at the best of its search, vqp-revival, at one as good, with its dead
codes replaced, and vqp-nearest, at the best without its beam; faiss, residual k-means on the
finished latents of none, encoded with the same beam; none, no quantizer.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from collapse.autoencoder import AUTOENCODERS  # noqa: E402
from collapse.conditions import CONDITIONS, EVERYWHERE, Plan, as_defined_now, plan_of, searched  # noqa: E402
from collapse.recordings import SOURCES, Recording, load  # noqa: E402
from collapse.run import Run  # noqa: E402


def plans(args: argparse.Namespace) -> Iterator[Plan]:
    """The runs asked for, seeds outermost, so that every condition has one early."""
    names = list(searched(args.search)) if args.search else args.conditions
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for seed, data, model, size, name in product(
        seeds, args.data, args.autoencoders, args.sizes, names
    ):
        plan = plan_of(data, size, name, seed, args.on, model, args.unseen_subjects)
        yield replace(plan, steps=args.steps or plan.steps, frames=args.frames or plan.frames)


def load_lines(path: Path) -> list[dict[str, Any]]:
    """Finished runs."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def perform(args: argparse.Namespace) -> None:
    """Run what is not in the file yet."""
    done = {json.dumps(line["plan"], sort_keys=True) for line in load_lines(args.out)}
    recordings: dict[str, Recording] = {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for plan in plans(args):
        if plan.key in done:
            continue
        if plan.data not in recordings:
            recordings[plan.data] = load(plan.data, args.folder, plan.subjects)
        result = Run(plan, recordings[plan.data])()
        with args.out.open("a") as file:
            file.write(json.dumps({"plan": asdict(plan), "result": result}) + "\n")
        print(line_of(plan, result), flush=True)


def line_of(plan: Plan, result: dict[str, Any]) -> str:
    """One run in one line."""
    text = f"{plan.data} {plan.autoencoder} {plan.size} {plan.on}"
    text += f" seed {plan.seed} {plan.condition:<28}"
    if "utilization" in result:
        worst, mean = min(result["perplexity_of_k"]), float(np.mean(result["perplexity_of_k"]))
        text += f" used ≥ {100 * min(result['utilization']):5.1f} %  perplexity/K {mean:.3f}"
        text += f" (worst {worst:.3f})"
    text += (
        "  SNR pooled {snr_pooled_db:.2f} (latents {snr_latents_db:.2f}) median {snr_median_db:.2f}"
        " train {snr_train_db:.2f} dB"
    )
    text += "  {ms_step:.0f} ms/step ({ms_quantizer:.0f})  revived {revived_per_step:.2f}"
    return text.format(**result)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=SOURCES, default=["feis"])
    parser.add_argument("--autoencoders", nargs="+", choices=AUTOENCODERS, default=["block"])
    parser.add_argument(
        "--unseen-subjects",
        action="store_true",
        help="hold out whole subjects, and validate on another, where there are several",
    )
    parser.add_argument("--sizes", nargs="+", default=["8x256"], metavar="QxK")
    parser.add_argument(
        "--conditions",
        nargs="+",
        choices=CONDITIONS,
        default=[name for name in CONDITIONS if name not in EVERYWHERE],
        metavar="NAME",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many (3)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="SEED")
    parser.add_argument("--on", choices=("held", "validation"), default="held")
    parser.add_argument("--search", choices=("ours", "vqp"), help="the settings to choose among")
    parser.add_argument("--steps", type=int, help="instead of the size's own number")
    parser.add_argument("--frames", type=int, help="frames in a step, likewise")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "collapse" / "runs.jsonl")
    parser.add_argument("--report", action="store_true", help="write docs/ and run nothing")
    args = parser.parse_args(arguments)
    if args.search:
        args.on = "validation"
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(args.threads)
    if args.report:
        from collapse.everywhere import write_everywhere
        from collapse.report import write_report

        lines = [line for line in load_lines(args.out) if as_defined_now(line)]
        unseen = [line for line in lines if line["plan"]["subjects"]]
        if len(lines) > len(unseen):
            write_report([line for line in lines if line not in unseen], ROOT / "docs")
        if unseen:
            write_everywhere(unseen, ROOT / "docs")
    else:
        perform(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
