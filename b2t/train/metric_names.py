"""What a run can log: checked where it chooses the best model, stops early or raises alerts."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from b2t.config import Config, PhaseConfig
from b2t.config.alert_rules import AlertRule
from b2t.errors import UserError
from b2t.log import logger
from b2t.model.objectives import OBJECTIVES
from b2t.monitor.reconstruction import BANDS_HZ
from b2t.train.pace import RANK_METRIC, WAIT_METRIC

if TYPE_CHECKING:
    from b2t.model import BrainToText
    from b2t.quantize import ResidualVQ
    from b2t.train.build import Materials

log = logger(__name__)

DECODED = ("val/wer", "val/cer", "val/per", "val/distinct_ratio")
"""What only decoding says."""

_ON_SOME_MACHINES = {
    "memory/peak_gib", "throughput/mfu", "throughput/hfu", WAIT_METRIC, RANK_METRIC,
}  # fmt: skip
"""Where the device is a GPU, and a known one, or there are several ranks: a configuration may serve
several machines."""


def active_losses(model: "BrainToText", phase: PhaseConfig) -> dict[str, float]:
    """Weights of the losses that a phase computes: above 0, of components that the model has."""
    weights = phase.losses.model_dump()
    return {
        name: weight
        for name, weight in weights.items()
        if weight > 0 and getattr(model, OBJECTIVES[name].component) is not None
    }


def decode_trials(config: Config, phase: PhaseConfig) -> int:
    """Trials that a phase decodes freely."""
    return config.evaluation.decode_trials if phase.decode_trials is None else phase.decode_trials


def validation_names(config: Config, materials: "Materials", phase: PhaseConfig) -> set[str]:
    """Names of what validations within a phase can say; decoding counts where it is repeated."""
    model, losses = materials.model, active_losses(materials.model, phase)
    spoken, phonemes = _labels(materials)
    labelled = {"generation": spoken, "phoneme": phonemes}
    said = {name for name in losses if labelled.get(name, True)}
    names = {"val/loss"}
    names |= {f"val/{n}" for n in said if OBJECTIVES[n].per}
    if "reconstruction" in said:
        names.add("val/snr_db")
    if "generation" in said:
        names |= _of_text(model, "val/", "val/text/")
    if "phoneme" in said:
        names.add("val/phoneme/left_out_fraction")
    if model.quantizer is not None:
        for q in range(model.quantizer.num_quantizers):
            names |= {f"val/codebook/utilization/{q}", f"val/codebook/perplexity/{q}"}
    if config.evaluation.decode_every and decode_trials(config, phase):
        if "generation" in said:
            names |= {"val/wer", "val/cer", "val/distinct_ratio"}
        if model.phoneme_head is not None and phonemes:
            names.add("val/per")
    return names


def _labels(materials: "Materials") -> tuple[bool, bool]:
    """Whether validation trials have text, and whether they have phonemes."""
    rows, columns = materials.validation, materials.validation.column_names
    spoken = materials.tokenizer is not None and any(rows["text"]) if "text" in columns else False
    return spoken, "phonemes" in columns and any(len(said or ()) for said in rows["phonemes"])


def best_rules(config: Config, materials: "Materials") -> list[tuple[str, Literal["min", "max"]]]:
    """Metric and direction that choose the best model of each phase.

    A phase that cannot log `checkpoint.best_metric`, where another can, goes by its `val/loss`.

    Raises:
        UserError: on all ranks alike, where no phase can log it, or a phase cannot log the metric
            of its early stopping.
    """
    by_phase = [validation_names(config, materials, phase) for phase in config.phases]
    saving = config.checkpoint
    if not any(saving.best_metric in names for names in by_phase):
        _refuse(
            "checkpoint.best_metric", saving.best_metric, by_phase, config, materials, config.phases
        )
    for number, (phase, names) in enumerate(zip(config.phases, by_phase, strict=True)):
        rule = phase.early_stopping
        if rule is not None and rule.metric not in names:
            key = f"phases.{number}.early_stopping.metric"
            _refuse(key, rule.metric, [names], config, materials, [phase])
    return [
        (saving.best_metric, saving.best_mode)
        if saving.best_metric in names
        else ("val/loss", "min")
        for names in by_phase
    ]


def _refuse(
    key: str,
    name: str,
    by_phase: Sequence[set[str]],
    config: Config,
    materials: "Materials",
    phases: Sequence[PhaseConfig],
) -> None:
    known = sorted(set().union(*by_phase))
    where = f"phase {phases[0].name}" if len(phases) == 1 else "this run"
    hints = _reason(name, config, materials, phases) + _near(name, known)
    raise UserError(
        f"{key}: no validation of {where} says {name}; {hints}there are {', '.join(known)}"
    )


def _of_text(model: "BrainToText", predicted: str, laid: str) -> set[str]:
    """What the loss of the text says besides, by how its tokens are learnt."""
    names = {f"{predicted}token_accuracy"} if model.predicts_tokens else set()
    return names | ({f"{laid}left_out_fraction"} if model.lays_tokens else set())


def _reason(
    name: str, config: Config, materials: "Materials", phases: Sequence[PhaseConfig]
) -> str:
    """Say what a known metric would need, nothing of an unknown one."""
    spoken, phonemes = _labels(materials)
    of_text = name in ("val/wer", "val/cer", "val/distinct_ratio", "val/generation")
    of_text = of_text or name == "val/token_accuracy"
    if of_text and (materials.model.text_decoder is None or not spoken):
        return "it needs a text decoder, and validation trials with text; "
    if of_text and not any(phase.losses.generation for phase in phases):
        return "it needs a phase that trains the text decoder (losses.generation above 0); "
    if name in ("val/per", "val/phoneme") and (
        materials.model.phoneme_head is None or not phonemes
    ):
        return "it needs a phoneme head, and validation trials with phonemes; "
    if name in DECODED and not config.evaluation.decode_every:
        return "it needs evaluation.decode_every above 0 (0 decodes after each phase only); "
    if name in DECODED and not any(decode_trials(config, phase) for phase in phases):
        return "it needs decode_trials above 0; "
    if name.startswith("val/codebook/") and materials.model.quantizer is None:
        return "it needs a quantizer; "
    return ""


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}? " if close else ""


def record_names(config: Config, materials: "Materials", phase: PhaseConfig) -> set[str]:
    """Names of what the log steps of a phase record, with monitors: what alert rules see."""
    model, losses = materials.model, active_losses(materials.model, phase)
    said = {*losses, "total"}
    quantizer = model.quantizer
    if quantizer is not None and config.model.quantizer.update_rule == "gradient":
        said.add("codebook")
    names = {f"{kind}/{n}" for kind in ("loss", "loss_smooth", "loss_trend") for n in said}
    names |= {f"loss_share/{n}" for n in said - {"total"}}
    names |= {"time/step_s", "time/data_wait_fraction", "throughput/frames_per_s"}
    names |= {"throughput/padding_fraction", "throughput/steps_per_s", "codebook/revived"}
    names |= {"codebook/nonfinite_frames", "optim/skipped_steps", "optim/loss_scale"}
    names |= {"optim/grad_norm", *_ON_SOME_MACHINES}
    for name in phase.trainable:
        if getattr(model, name) is not None:
            names |= {f"optim/lr/{name}", f"optim/grad_norm/{name}"}
    if "reconstruction" in losses:
        names |= _of_reconstruction(materials.info.sampling_rate)
        if "commitment" in losses:
            names.add("loss/vq_ratio")
    if "generation" in losses:
        names |= _of_text(model, "text/", "text/")
    if "phoneme" in losses:
        names.add("phoneme/left_out_fraction")
    if quantizer is not None:
        names.add("codebook/temperature")
        if "quantizer" in phase.trainable:
            names |= _of_codebooks(quantizer)
    return names


def _of_reconstruction(sampling_rate: float) -> set[str]:
    kinds = ("snr_db", "mse", "snr_window_db", "snr_drop_db", "cosine", "temporal_consistency")
    bands = [f"{low:g}-{high:g}Hz" for low, high in BANDS_HZ if low < sampling_rate / 2]
    names = {f"reconstruction/{kind}" for kind in kinds}
    return names | {f"reconstruction/spectral_distance_db/{band}" for band in bands}


def _of_codebooks(quantizer: "ResidualVQ") -> set[str]:
    by_layer = ("utilization", "perplexity", "entropy_nats", "dead")
    names = {f"codebook/{kind}/{q}" for kind in by_layer for q in range(quantizer.num_quantizers)}
    kinds = """utilization utilization_worst worst_layer perplexity perplexity_fraction dead health
        perplexity_worst_fraction frames_per_code layer_correlation utilization_trend
        perplexity_trend""".split()  # noqa: SIM905  # as one text it is half as long
    names |= {f"codebook/{kind}" for kind in kinds}
    by_book = """movement cluster_size_min cluster_size_std cluster_size_mean tiny_clusters revived
        code_variance effective_rank""".split()  # noqa: SIM905  # as above
    books = range(max(quantizer.num_quantizers, len(quantizer.codebooks.embed)))
    names |= {f"ema/{kind}/{q}" for kind in by_book for q in books}
    kinds = [
        "movement",
        "code_variance_min",
        "revived_per_step",
        "revived_fraction",
        "warm",
        "ranks_differ",
    ]
    return names | {f"ema/{kind}" for kind in kinds}


def fitting_rules(
    rules: Sequence[AlertRule], config: Config, materials: "Materials", own: Iterable[str]
) -> list[AlertRule]:
    """Return the rules that this run can check.

    Built-in rules on what the run never logs are left out. Rules on what only a later phase logs
    are not expected to hear of it soon.

    Args:
        rules: all that the configuration asks for.
        config: the run's.
        materials: whose model and data say what is logged.
        own: names of the user's own rules.

    Raises:
        UserError: a rule of the user's watches what this run never logs.
    """
    by_phase = [record_names(config, materials, phase) for phase in config.phases]
    known = set().union(*by_phase)
    own, kept = set(own), []
    for rule in rules:
        watched = [rule.metric, *(condition.metric for condition in rule.also)]
        absent = [name for name in watched if not _match(name, known)]
        if absent and rule.name in own and rule.expected:
            _refuse_rule(rule, absent[0], known)
        if absent and rule.name not in own:
            continue
        soon = all(_match(name, by_phase[0]) for name in watched)
        kept.append(rule if soon else rule.model_copy(update={"expected": False}))
    return kept


def _match(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _refuse_rule(rule: AlertRule, name: str, known: set[str]) -> None:
    why = "rules see the records of log steps, not validations; " if name.startswith("val/") else ""
    raise UserError(
        f"monitor.extra_rules: rule {rule.name} watches {name}, which this run never logs; {why}"
        f"{_near(name, sorted(known))}expected: false lets it wait in silence; there are "
        f"{', '.join(sorted(known))}"
    )
