"""Trains many short runs, each made to fail in its own way, on the ranks that launch this."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from b2t.config import load_config
from b2t.log import configure
from b2t.train import launch, monitoring, ranks
from b2t.train import main as entry
from b2t.train.ds_config import load_ds_config

QUIET = "{enabled: true, time_shift_ms: 0, channel_dropout: 0, noise_std: 0, scale: [S, S]}"
"""No augmentation but a constant factor, as of signals that nobody has normalised."""

NO_LOSS = (
    "{reconstruction: 1.0e-12, generation: 0, commitment: 0, diversity: 0, perplexity: 0, "
    "phoneme: 0}"
)


def alike(trainer: Any) -> None:
    """All codes at one place, as after latents that have collapsed to a point."""
    books = trainer.model.quantizer.codebooks
    books.embed[:] = books.embed.mean(1, keepdim=True)


def one_sided(trainer: Any) -> None:
    """A rank whose codebooks have missed something."""
    if trainer.ranks.rank == 1:
        trainer.model.quantizer.codebooks.embed += 1e-6


def cut(trainer: Any) -> None:
    """Gradients that arrive as zeros, as from a graph that is cut."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and not getattr(parameter, "cut", False):
            parameter.register_hook(torch.zeros_like)
            parameter.cut = True


@dataclass
class Case:
    """Settings, and what is done to the run after each step."""

    overrides: list[str] = field(default_factory=list)
    sabotage: Callable[[Any], None] | None = None
    steps: int = 16


CASES = {
    "healthy": Case(["monitor.window=20"], steps=45),
    "learning rate": Case(["phases.0.lr=1", "phases.0.revival=false"], steps=40),
    "loss weights": Case([f"phases.0.losses={NO_LOSS}", "log.report=true"]),
    "cut graph": Case(sabotage=cut),
    "overflow": Case(
        ["phases.0.losses.reconstruction=1.0e+39", "stability.max_consecutive_skips=3"]
    ),
    "restless revival": Case(
        [
            "model.quantizer.revival_threshold=0.9",
            "model.quantizer.revival_every=1",
            "model.quantizer.codebook_size=128",
        ]
    ),
    "codes that do not follow": Case(
        [
            f"data.augment={QUIET.replace('S', '0.001')}",
            "phases.0.lr=0.02",
            "phases.0.losses.commitment=1.0e-6",
            "model.quantizer.decay=0.9999",
        ],
        steps=40,
    ),
    "codes alike": Case(sabotage=alike),
    "few frames": Case(
        [
            "model.encoder.patch_size=30",
            "model.encoder.patch_stride=30",
            "model.text_decoder.enabled=true",
            "model.text_decoder.kind=ctc",
        ]
    ),
    "ranks apart": Case(sabotage=one_sided),
    "rule of a GPU": Case(
        ["monitor.extra_rules=[{name: mine, metric: memory/peak_gib, threshold: 1, message: low}]"],
        steps=42,
    ),
}


def main() -> int:
    """Train all cases; leave each rank's exit statuses beside the run folders."""
    arguments = entry.parser().parse_intermixed_args()
    joined = ranks.join(120.0)
    # The cases share a process group: DeepSpeed keeps groups of one that has been left.
    launch.join, left = lambda timeout_s: joined, launch.leave
    launch.leave = lambda: None
    configure(joined.rank)
    statuses = {name: train(arguments, name, case) for name, case in CASES.items()}
    folder = load_config(arguments.config, arguments.overrides).run.dir
    file = folder / f"statuses-{joined.rank}.json"
    file.write_text(json.dumps(statuses), "utf-8")
    left()
    return 0


def train(arguments: Any, name: str, case: Case) -> int:
    """Train one case; return the exit status that `train_ds.py` would leave with."""

    class Watch(plain):  # type: ignore[misc, valid-type]
        def on_step(self, trainer: Any, context: Any) -> None:
            if case.sabotage is not None:
                case.sabotage(trainer)
            super().on_step(trainer, context)

    launch.Watch = Watch
    overrides = [*arguments.overrides, f"phases.0.steps={case.steps}", *case.overrides]
    config = load_config(arguments.config, overrides)
    config.run.dir /= name
    return entry.train(config, load_ds_config(arguments.deepspeed_config), "never")


plain = monitoring.Watch

if __name__ == "__main__":
    sys.exit(main())
