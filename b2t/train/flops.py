"""Operations of a training step, for the utilization of known GPUs."""

from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from b2t.config import Config, PhaseConfig
from b2t.data.batches import Batch, TrialRows, collate
from b2t.model.brain_to_text import BrainToText
from b2t.model.outputs import Encoded
from b2t.train.build import Materials


class StepFlops(NamedTuple):
    """Operations per valid latent frame."""

    per_frame: float
    """Forward and backward of what the phase trains."""
    recomputed: float
    """What is executed beyond that, as a fraction of it; at most, for torch recomputes no more of
    a block than backward asks for."""


def flops_of_phases(
    config: Config, materials: Materials, accumulation: int
) -> dict[str, StepFlops]:
    """Operations of each phase by its name, from one forward of the median trial on the CPU."""
    batch = _median_trial(config, materials)
    forward = forward_flops(materials.model, batch)
    frames = int(materials.model.frame_mask(batch.signal_mask).sum())
    return {
        phase.name: phase_flops(config, phase, forward, frames, accumulation)
        for phase in config.phases
    }


@torch.no_grad()
def forward_flops(model: BrainToText, batch: Batch) -> dict[str, float]:
    """Operations of one forward by component, matrix products alone.

    Those of the transformers are counted as they run; the quantizer's are its search, 2·Q·K·D for
    each frame (its kernels are opaque to the counter).
    """
    training = model.training
    model.eval()
    latents, mask = model.latents(batch.signal, batch.signal_mask, batch.session)
    runs = {"encoder": lambda: model.latents(batch.signal, batch.signal_mask, batch.session)}
    signal_decoder, head, decoder = model.signal_decoder, model.phoneme_head, model.text_decoder
    if signal_decoder is not None:
        runs["signal_decoder"] = lambda: signal_decoder(latents, mask, batch.signal.shape[1])
    if head is not None:
        runs["phoneme_head"] = lambda: head(latents)
    if decoder is not None and batch.tokens.shape[1]:
        read = Encoded(latents, latents, None, mask, {}, None)
        runs["text_decoder"] = lambda: decoder(*model.text_memory(read), batch.tokens)
    found = {}
    for name, run in runs.items():
        # The counter does not know the fused attention of CPUs; as matrix products it does.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        found[name] = float(counter.get_total_flops())
    quantizer = model.quantizer
    if quantizer is not None:
        codes = quantizer.num_quantizers * quantizer.codebook_size * quantizer.codebook_dim
        found["quantizer"] = 2.0 * codes * int(mask.sum())
    model.train(training)
    return found


def phase_flops(
    config: Config, phase: PhaseConfig, forward: dict[str, float], frames: int, accumulation: int
) -> StepFlops:
    """Add up what a phase does with each component.

    A trained component costs its forward three times, a frozen one that passes gradients on twice,
    a frozen one with nothing to pass on once; one whose loss has no weight is not run.

    Args:
        config: the configuration, for activation checkpointing.
        phase: the phase.
        forward: operations of one forward, see `forward_flops`.
        frames: valid latent frames of that forward.
        accumulation: micro-batches per step; more than one adds a pass of the encoder where the
            regularisers need it.
    """
    losses, trained = phase.losses, set(phase.trainable)
    weight = {
        "signal_decoder": losses.reconstruction,
        "phoneme_head": losses.phoneme,
        "text_decoder": losses.generation,
    }
    upstream = bool(trained & {"adapter", "encoder"})
    knobs = config.model.activation_checkpointing.model_dump()
    model = executed = 0.0
    for name, cost in forward.items():
        if name == "quantizer":
            factor = 1.0
        elif name == "encoder":
            factor = 3.0 if name in trained else 2.0 if upstream else 1.0
        elif not weight[name]:
            continue
        else:
            factor = 3.0 if name in trained else 2.0 if upstream else 1.0
        model += factor * cost
        if knobs.get(name) and factor > 1:
            executed += cost / knobs[name]
    regularised = losses.diversity > 0 or losses.perplexity > 0
    if accumulation > 1 and regularised and phase.exact_regularizers and "quantizer" in forward:
        executed += forward["encoder"]
    return StepFlops(model / frames, executed / model)


def _median_trial(config: Config, materials: Materials) -> Batch:
    from b2t.data.trials import signal_lengths

    lengths = signal_lengths(materials.train)
    row = int(lengths.argsort(kind="stable")[len(lengths) // 2])
    rows = TrialRows(
        materials.train,
        materials.tokenizer,
        materials.info.sessions,
        max_tokens=config.data.max_text_tokens,
    )
    return collate([rows.example(0, row)]).to("cpu")
