"""Validation during training: losses over the whole split, decoding after each phase."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch

from b2t.config import Config, EvaluationConfig, PhaseConfig
from b2t.data.batches import Batch, eval_batches
from b2t.data.trials import spread_over_sessions
from b2t.evaluate import usage
from b2t.evaluate.evaluation import Evaluation, evaluate_model
from b2t.evaluate.signal import decibels
from b2t.evaluate.waiting import with_time_left
from b2t.log import logger
from b2t.model.brain_to_text import BrainToText
from b2t.model.objectives import COUNTS, WEIGHTED
from b2t.quantize import StepNorms
from b2t.train.build import Materials, masking_of
from b2t.train.metric_names import decode_trials
from b2t.train.ranks import Ranks
from b2t.train.stopping import StopRequests
from b2t.train.window import LEFT_OUT, left_out

log = logger(__name__)

_NORMALISER = {name: loss.per for name, loss in WEIGHTED.items() if loss.per}
"""Losses that are means over elements; the regularisers of a batch are no validation metric."""

_FASTER = "faster: fewer evaluation.decode_trials, num_beams, max_new_tokens"

_POOLED = (
    "squared_error", "signal_power", "tokens_correct", *LEFT_OUT,
)  # fmt: skip


def validation_batches(
    config: Config, materials: Materials, ranks: Ranks, limit: int | None, phase: int | None = None
) -> Iterator[Batch]:
    """Return a rank's share of the validation trials (`limit` of them, from all sessions).

    What phase number `phase` hides from the encoder is hidden, the same each time.
    """
    dataset = materials.validation
    if limit is not None:
        dataset = dataset.select(spread_over_sessions(dataset, limit))
    return eval_batches(
        dataset,
        materials.tokenizer,
        materials.info.sessions,
        augment=materials.augment,
        batch_size=config.evaluation.batch_size,
        rank=ranks.rank,
        world=ranks.world,
        max_tokens=config.data.max_text_tokens,
        masking=None if phase is None else masking_of(config, phase),
    )


@torch.no_grad()
def validate(
    model: BrainToText,
    batches: Iterable[Batch],
    losses: Mapping[str, float],
    dtype: torch.dtype,
    ranks: Ranks,
) -> dict[str, float]:
    """Return `val/…` metrics pooled over all trials and ranks: losses, SNR, codes in use.

    Args:
        model: left in training mode.
        batches: this rank's share of the trials.
        losses: weights of those that are trained, by name.
        dtype: of the model's weights.
        ranks: whose shares are pooled. Collective.
    """
    weights = {name: weight for name, weight in losses.items() if name in _NORMALISER}
    ones = StepNorms(dict.fromkeys(COUNTS, 1.0))
    keys = (*_NORMALISER, *COUNTS, "rows", *_POOLED)
    sums = dict.fromkeys(keys, 0.0)
    codes, quantizer = None, model.quantizer
    model.eval()
    for batch in batches:
        for name, value in model.counts(batch).items():
            sums[name] += float(value)
        output = model(batch.to(ranks.device, dtype), ones, weights)
        for name in _NORMALISER.keys() & output.losses.keys():
            sums[name] += float(output.losses[name])
        for name in _POOLED:
            sums[name] += float(output.metrics.get(name, 0.0))
        if output.codes is not None and quantizer is not None and quantizer.initialized:
            counts = usage.count_codes(output.codes, quantizer.codebook_size).cpu()
            codes = counts if codes is None else codes + counts
    model.train()
    total = dict(zip(sums, ranks.sum(list(sums.values())), strict=True))
    return _metrics(total, weights, model.predicts_tokens) | _codes_in_use(ranks.gather(codes))


def _codes_in_use(counts: Iterable[torch.Tensor | None]) -> dict[str, float]:
    """Utilization and perplexity of each layer from every rank's counts [Q, K]."""
    shares = [share for share in counts if share is not None]
    if not shares:
        return {}
    pooled = torch.stack(shares).sum(0)
    metrics = {}
    for q, value in enumerate(usage.utilization(pooled).tolist()):
        metrics[f"val/codebook/utilization/{q}"] = value
    for q, value in enumerate(usage.perplexity(pooled).tolist()):
        metrics[f"val/codebook/perplexity/{q}"] = value
    return metrics


def _metrics(
    total: dict[str, float], weights: dict[str, float], predicts_tokens: bool
) -> dict[str, float]:
    metrics = {"val/loss": 0.0}
    for name, counted in _NORMALISER.items():
        if weights.get(name) and total[counted] > 0:
            metrics[f"val/{name}"] = total[name] / total[counted]
            metrics["val/loss"] += weights[name] * metrics[f"val/{name}"]
    if total["squared_error"] > 0 and total["signal_power"] > 0:
        metrics["val/snr_db"] = decibels(total["signal_power"], total["squared_error"])
    if predicts_tokens and weights.get("generation") and total["tokens"] > 0:
        metrics["val/token_accuracy"] = total["tokens_correct"] / total["tokens"]
    metrics.update({f"val/{name}": value for name, value in left_out(total).items()})
    return metrics


def decoding_due(section: EvaluationConfig, phase: PhaseConfig, step: int) -> bool:
    """Whether the validation of this step decodes: a function of the step, so resumes agree."""
    every = phase.evaluate_every or section.every
    wanted = section.decode_every
    return wanted > 0 and step // wanted > (step - every) // wanted


def decode(
    model: BrainToText,
    config: Config,
    materials: Materials,
    phase: PhaseConfig,
    ranks: Ranks,
    stops: StopRequests,
) -> Evaluation | None:
    """Decode validation trials freely on all ranks; None where the phase decodes none.

    Raises:
        Interrupted: on all ranks, where one was asked to stop.
    """
    section, trials = config.evaluation, decode_trials(config, phase)
    if trials == 0:
        return None
    speaks = phase.losses.generation > 0
    heard = stops.until_heard(validation_batches(config, materials, ranks, trials))
    mine = -(-min(trials, len(materials.validation)) // ranks.world)
    result = evaluate_model(
        model,
        with_time_left(heard, f"decoding after phase {phase.name}", mine, _FASTER, hidden=True),
        materials.tokenizer if speaks else None,
        split=config.data.validation_split,
        simulated=materials.info.simulated,
        noise_control=False,
        decode=speaks,
        seed=config.run.seed,
        gather=stops.gather,
        max_new_tokens=section.max_new_tokens,
        num_beams=section.num_beams,
    )
    model.train()
    return result


def scores(result: Evaluation | None, trained: Collection[str]) -> dict[str, float]:
    """Return the `val/…` metrics of a decoding, the same on all ranks.

    Args:
        result: the decoding, if there was one.
        trained: components that have been trained: of an untrained signal decoder no SNR is told.
    """
    names = ["wer", "cer", "per", "distinct_ratio"]
    names += ["snr_db"] if "signal_decoder" in trained else []
    found = {} if result is None else result.scalars()
    return {f"val/{name}": value for name, value in found.items() if name in names}


def show_decoded(result: Evaluation) -> None:
    """Log some of what was decoded."""
    spoken = [p for p in result.predictions if p.prediction is not None and p.target]
    for prediction in spoken[:3]:
        log.info("  target: %s", prediction.target)
        log.info("  output: %s", prediction.prediction)
