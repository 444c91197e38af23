"""What is compared: conditions, the settings searched, and the plan of a run."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

# Where the search began.
BEFORE: dict[str, Any] = {
    "pass_through": 0.03,
    "frames_per_code": 16,
    "commitment": 0.25,
    "diversity": 0.0,
    "perplexity": 0.0,
    "decay": 0.97,
    "rotation_trick": True,
    "revival_threshold": 0.3,
}

BEAM = {"beam_size": 8, "eval_beam_size": 16}

# On validation epochs within 0.03 dB of the best mean of the three SNRs among settings that reach
# the targets of use.
RECIPE: dict[str, Any] = BEFORE | {"commitment": 0.1, "decay": 0.98} | BEAM

_REGULARIZERS = {"diversity": 0.1, "perplexity": 0.05}

# Each switches one feature of the recipe off (no-), or one on beside nearest codes (with-), to be
# compared with no-beam.
ABLATIONS: dict[str, dict[str, Any]] = {
    "no-beam": {"beam_size": 1, "eval_beam_size": 1},
    "no-training-beam": {"beam_size": 1},
    "no-kmeans": {"kmeans_init": False},
    "no-lloyd": {"kmeans_iters": 0},
    "no-pass-through": {"pass_through": 0.0},
    "no-revival": {"revival": None},
    "no-revival-end": {"revival_until": 1.01},
    "no-rotation": {"rotation_trick": False},
    "no-ema": {"update_rule": "gradient"},
    "no-commitment": {"commitment": 0.0},
    "fast-decay": {"decay": 0.95},
    "more-commitment": {"commitment": 0.25},
    "late-revival": {"revival_threshold": 0.1},
    "with-regularizers": _REGULARIZERS,
    "with-diversity": {"diversity": 0.1},
    "with-constant-temperature": _REGULARIZERS | {"temperature": 1.0, "temperature_end": 1.0},
    "with-frame-revival": {"revival": "frames"},
    "with-sampling": {"stochastic_sample_codes": True, "temperature": 0.5, "temperature_end": 0.02},
    "with-cosine": {"use_cosine_sim": True},
    "with-dropout": {"quantize_dropout": True},
    "with-shared": {"shared_codebook": True},
}

# Chosen over several recordings and two autoencoders; see `collapse.everywhere`.
_CHOSEN = {
    "decay": 0.98,
    "commitment": 0.4,
    "rotation_trick": False,
    "revival_threshold": 0.1,
    "eval_beam_size": 16,
    "pass_through": 0.5,
}
EVERYWHERE: dict[str, dict[str, Any]] = {
    "default": _CHOSEN,
    "default-rotation": _CHOSEN | {"rotation_trick": True},
    "default-no-revival": _CHOSEN | {"revival": None},
    "default-joint": _CHOSEN | {"joint_update": True},
    "default-joint-no-revival": _CHOSEN | {"joint_update": True, "revival": None},
    "default-beam-2": _CHOSEN | {"beam_size": 2},
}
# Share of the steps without quantizing, and weight of commitment; the first was the default before.
_TRIED = (0.03, 0.05), (0.2, 0.05), (0.5, 0.05), (0.75, 0.05), (0.35, 0.15), (0.5, 0.15)
EVERYWHERE |= {
    f"start-{start}-commitment-{weight}": _CHOSEN | {"pass_through": start, "commitment": weight}
    for start, weight in _TRIED
}

NAIVE: dict[str, Any] = {
    "pass_through": 0.0,
    "frames_per_code": 0,
    "commitment": 0.25,
    "diversity": 0.0,
    "perplexity": 0.0,
    "kmeans_init": False,
    "revival": None,
    "rotation_trick": False,
}

# Best mean of the three SNRs on validation epochs.
PEER_BEST: dict[str, Any] = {
    "kmeans_init": True,
    "decay": 0.98,
    "commitment_weight": 0.05,
    "rotation_trick": False,
}

# The same with its beam search in evaluation, and with its dead codes replaced too.
PEER_BEAM = PEER_BEST | {"beam_size": 1, "eval_beam_size": 16}
PEER_REVIVAL = PEER_BEAM | {"threshold_ema_dead_code": 0.1}

# The same, after as many steps without quantizing as the default takes: the study's, not its own.
PEER_LATE = PEER_BEAM | {"pass_through": _CHOSEN["pass_through"]}

# As many settings each, chosen among on validation epochs.
_SLOW = {"decay": 0.98, "revival_until": 0.7, "revival_threshold": 0.1}
_BASE = {"decay": 0.98, "commitment": 0.1}
_ANEW = _BASE | _REGULARIZERS
SEARCH_OURS: list[dict[str, Any]] = [
    _SLOW,
    _SLOW | {"commitment": 0.5},
    _SLOW | {"commitment": 0.1},
    _SLOW | {"decay": 0.95},
    {"revival_threshold": 0.2},
    {"revival_threshold": 0.2, "revival_every": 10},
    {"revival_threshold": 0.1},
    {"decay": 0.98},
    {"commitment": 0.1},
    {"decay": 0.98, "commitment": 0.1},
    {"decay": 0.98, "commitment": 0.05},
    {"decay": 0.98, "commitment": 0.1, "revival_until": 0.7},
    _ANEW | {"revival_threshold": 0.1},
    _ANEW,
    _BASE | {"eval_beam_size": 8},
    _BASE | {"eval_beam_size": 16},
    _BASE | {"beam_size": 4, "eval_beam_size": 16},
    _BASE | BEAM,
    _BASE | BEAM | {"revival_threshold": 0.2},
    _BASE | BEAM | {"revival_threshold": 0.1},
    _BASE | BEAM | {"commitment": 0.05},
]
_STARTED = {"kmeans_init": True, "decay": 0.95}
_STRAIGHT = _STARTED | {"commitment_weight": 0.1, "rotation_trick": False}
SEARCH_PEER: list[dict[str, Any]] = [
    {"kmeans_init": True},
    {"kmeans_init": True, "threshold_ema_dead_code": 2},
    _STARTED | {"rotation_trick": False},
    _STARTED | {"commitment_weight": 0.25},
    _STARTED | {"commitment_weight": 0.1},
    _STRAIGHT,
    _STARTED | {"commitment_weight": 0.25, "threshold_ema_dead_code": 0.2},
    _STRAIGHT | {"commitment_weight": 0.05},
    _STRAIGHT | {"decay": 0.98},
    _STRAIGHT | {"decay": 0.98, "commitment_weight": 0.05},
    _STRAIGHT | {"decay": 0.9},
    _STRAIGHT | {"threshold_ema_dead_code": 0.1},
    PEER_BEST | {"commitment_weight": 0.02},
    PEER_BEST | {"threshold_ema_dead_code": 0.1},
    # Its beam search in training fails after its k-means start.
    PEER_BEST | {"beam_size": 1, "eval_beam_size": 8},
    PEER_BEAM,
    PEER_REVIVAL,
    PEER_BEAM | {"threshold_ema_dead_code": 0.3},
    PEER_BEAM | {"commitment_weight": 0.02},
    PEER_BEAM | {"commitment_weight": 0.1},
    PEER_BEST | {"kmeans_init": False, "beam_size": 8, "eval_beam_size": 16},
]


# 8192 codes have few frames each: the recipe holds the latents closer. Chosen on validation epochs.
RECIPE_BY_CODES: dict[int, dict[str, Any]] = {8192: {"commitment": 0.5}}

# What naive runs were given there; they start from random codes and make no use of it.
NAIVE_BY_CODES: dict[int, dict[str, Any]] = {8192: {"frames_per_code": 4, "kmeans_iters": 4}}


def options_of(condition: str, codes: int) -> tuple[str, dict[str, Any]]:
    """Kind of quantizer (ours, peer, faiss, none) and its options."""
    if condition == "none":
        return condition, {}
    if condition == "faiss":
        return condition, {"eval_beam_size": BEAM["eval_beam_size"]}
    if condition == "vqp":
        return "peer", {}
    if condition == "vqp-nearest":
        return "peer", PEER_BEST
    if condition == "vqp-best":
        return "peer", PEER_BEAM
    if condition == "vqp-late":
        return "peer", PEER_LATE
    if condition == "vqp-revival":
        return "peer", PEER_REVIVAL
    naive = NAIVE | NAIVE_BY_CODES.get(codes, {})
    if condition in EVERYWHERE:
        return "ours", BEFORE | EVERYWHERE[condition]
    recipe = RECIPE | RECIPE_BY_CODES.get(codes, {})
    if condition == "naive":
        gradient = {"update_rule": "gradient", "codebook_gradient_scale": 1.0}
        return "ours", naive | gradient | {"narrow_start": True}
    if condition == "naive-normal":
        return "ours", naive | {"decay": 0.99, "normal_start": True}
    if condition == "naive-ema":
        return "ours", naive | {"decay": 0.99}
    if condition == "full":
        return "ours", recipe
    if condition.startswith("with-"):
        recipe = {name: value for name, value in recipe.items() if name not in BEAM}
    return "ours", recipe | ABLATIONS[condition]


NAIVES = ("naive", "naive-normal", "naive-ema")
PEERS = ("vqp", "vqp-best", "vqp-revival", "vqp-nearest", "vqp-late")
CONDITIONS = ("full", *ABLATIONS, *EVERYWHERE, *NAIVES, *PEERS, "faiss", "none")


# Steps and frames in a step for each number of codes: under a minute of one core for most.
BUDGET = {256: (800, 512), 1024: (600, 1024), 8192: (300, 2048)}

# The same where whole subjects are held out: many places, so shorter.
UNSEEN_BUDGET = (200, 512)


@dataclass(frozen=True)
class Plan:
    """One run.

    Args:
        data: name of the recording.
        size: quantizers × codes, as 8x256.
        condition: name of the condition.
        seed: of weights, batches and quantizer.
        on: ``held`` or ``validation``.
        steps: optimizer steps.
        frames: frames in a step.
        kind: see `options_of`.
        options: of the quantizer.
        autoencoder: name of the model around it.
        subjects: whole subjects are held out, instead of a part of each.
    """

    data: str
    size: str
    condition: str
    seed: int
    on: str
    steps: int
    frames: int
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    autoencoder: str = "block"
    subjects: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Quantizers and codes."""
        layers, codes = self.size.split("x")
        return int(layers), int(codes)

    @property
    def key(self) -> str:
        """What tells this run from others."""
        return json.dumps(asdict(self), sort_keys=True)


def plan_of(
    data: str,
    size: str,
    condition: str,
    seed: int,
    on: str,
    autoencoder: str = "block",
    subjects: bool = False,
) -> Plan:
    """The run of a condition, or of a searched setting, as defined now."""
    codes = int(size.split("x")[1])
    steps, frames = UNSEEN_BUDGET if subjects else BUDGET.get(codes, BUDGET[1024])
    settings = searched("ours") | searched("vqp")
    kind, options = settings.get(condition) or options_of(condition, codes)
    return Plan(
        data, size, condition, seed, on, steps, frames, kind, options, autoencoder, subjects
    )


def searched(search: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Kind and options of the settings of a search, by name."""
    ours = search == "ours"
    return {
        f"{search} " + " ".join(f"{k}={v}" for k, v in change.items()): (
            ("ours", BEFORE | change) if ours else ("peer", change)
        )
        for change in (SEARCH_OURS if ours else SEARCH_PEER)
    }


def as_defined_now(line: dict[str, Any]) -> bool:
    """Whether a finished run is one that this file would make today."""
    plan = line["plan"]
    names = ("data", "size", "condition", "seed", "on", "autoencoder", "subjects")
    try:
        now = plan_of(*(plan[name] for name in names))
    except KeyError:  # a condition of the past
        return False
    return json.loads(now.key) == plan
