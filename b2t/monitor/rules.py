"""The built-in alert rules."""

from b2t.config import AlertRule, Condition

ENOUGH_FRAMES = Condition(metric="codebook/frames_per_code", comparison=">", threshold=4.0)
"""With fewer frames per code even uniform use would leave codes out."""

WARM = Condition(metric="ema/warm", comparison=">", threshold=0.5)
"""Just after their start codebooks still settle, and revivals are many."""

COLLAPSED = AlertRule(
    name="codebook-collapse",
    metric="codebook/utilization_worst",
    threshold=0.10,
    severity="critical",
    patience=3,
    also=(ENOUGH_FRAMES, WARM),
    message="a quantizer layer uses {percent} of its codes",
    cause="codebook collapse: frames crowd on few codes, often a learning rate too high",
    remedy="lower the learning rate or lengthen the warm-up; revival on; decay 0.9",
)
"""Few codes of a layer are used at all."""

BUILT_IN: tuple[AlertRule, ...] = (
    AlertRule(
        name="loss-not-finite",
        metric="loss/*",
        comparison="not_finite",
        severity="critical",
        message="{metric} is not finite",
        cause="a learning rate too high, overflow in half precision, or a broken trial",
        remedy="lower the learning rate, train in bf16, or look at the last trials (b2t inspect)",
    ),
    AlertRule(
        name="zero-gradients",
        metric="optim/grad_norm",
        threshold=1e-8,
        severity="critical",
        patience=2,
        message="gradient norm {value}: nothing is learnt",
        cause="everything that the losses reach is frozen, all loss weights are 0, or the graph is "
        "cut",
        remedy="check phases.*.trainable against phases.*.losses",
    ),
    COLLAPSED,
    AlertRule(
        name="codebook-shrunk",
        metric="ema/code_variance_min",
        threshold=1e-6,
        severity="critical",
        patience=3,
        message="codes of a layer have a variance of {value}: they are all alike",
        cause="latents have collapsed to a point, or the layer before leaves nothing over",
        remedy="fewer quantizers, less commitment (0.1), or a lower learning rate",
    ),
    AlertRule(
        name="ranks-differ",
        metric="ema/ranks_differ",
        comparison=">",
        threshold=0.0,
        severity="critical",
        expected=False,
        message="codebooks differ between ranks",
        cause="a rank that missed an update or a collective",
        remedy="resume from the last checkpoint, and report the run's config",
    ),
    AlertRule(
        name="low-utilization",
        metric="codebook/utilization_worst",
        threshold=0.50,
        patience=3,
        also=(ENOUGH_FRAMES, WARM),
        message="a quantizer layer uses {percent} of its codes",
        cause="revival too rare or too aggressive, or codes that move too slowly",
        remedy="revival on, a higher revival_threshold, a larger batch, or decay 0.9",
    ),
    AlertRule(
        name="low-perplexity",
        metric="codebook/perplexity_worst_fraction",
        threshold=0.2,
        patience=3,
        also=(ENOUGH_FRAMES, WARM),
        message="a layer's perplexity is {percent} of its codes",
        cause="mode collapse: a few codes take most frames",
        remedy="revival on, lower decay, larger eps, or fewer codes (b2t report says how many the "
        "data bear)",
    ),
    AlertRule(
        name="vq-ratio",
        metric="loss/vq_ratio",
        comparison=">",
        threshold=10.0,
        patience=3,
        message="the quantizer's loss is {value} times the reconstruction loss",
        cause="commitment too strong, or latents that grow faster than the codes follow",
        remedy="commitment 0.1, or a lower decay",
    ),
    AlertRule(
        name="revival-churn",
        metric="ema/revived_per_step",
        comparison=">",
        threshold=5.0,
        patience=5,
        also=(
            Condition(metric="ema/revived_fraction", comparison=">", threshold=0.01),
            WARM,
        ),
        message="{value} codes are revived per step",
        cause="the revival threshold is too high for this data: codes die as fast as they come",
        remedy="revival_threshold towards 0.1, revival_every 20, or fewer codes",
    ),
    AlertRule(
        name="gradient-spike",
        metric="optim/grad_norm",
        comparison=">",
        threshold=10.0,
        patience=2,
        message="gradient norm {value} before clipping",
        cause="clipping not in force, or a learning rate too high",
        remedy="check gradient_clipping in the DeepSpeed file, lower the learning rate, or "
        "accumulate over more micro-batches",
    ),
    AlertRule(
        name="snr-falls",
        metric="reconstruction/snr_drop_db",
        comparison=">",
        threshold=3.0,
        patience=3,
        expected=False,
        message="the reconstruction is {value} dB below its best in this phase",
        cause="codes that drift away from the latents, or training that diverges",
        remedy="lower the learning rate; more weight on reconstruction",
    ),
    AlertRule(
        name="phonemes-left-out",
        metric="phoneme/left_out_fraction",
        comparison=">",
        threshold=0.1,
        patience=3,
        expected=False,
        message="{percent} of the trials with phonemes have too few latent frames for them, and "
        "teach the phoneme head nothing",
        cause="patches too long for this speech (CTC needs a frame for each phoneme, and one more "
        "between two equal ones), or trials that are cut short",
        remedy="lower model.encoder.patch_stride, or leave such trials out (b2t inspect)",
    ),
    AlertRule(
        name="texts-left-out",
        metric="text/left_out_fraction",
        comparison=">",
        threshold=0.1,
        patience=3,
        expected=False,
        message="{percent} of the trials with text have fewer frames or phonemes than tokens, and "
        "teach the text decoder nothing",
        cause="tokens that are too short to be laid on what is heard, as bytes are",
        remedy="set model.text_decoder.tokenizer=bpe, raise model.text_decoder.bpe_vocab_size, or "
        "lower model.encoder.patch_stride",
    ),
    AlertRule(
        name="ema-warm",
        metric="ema/warm",
        comparison=">",
        threshold=0.5,
        severity="info",
        once=True,
        expected=False,
        message="EMA warm-up complete: the codebooks' averages rest on data alone",
    ),
)
"""Silent on a healthy run. High utilization alone raises nothing: the best runs use 99 %."""


def _bounds(metric: str, label: str, **bounds: float) -> tuple[AlertRule, ...]:
    below, above = bounds.get("below"), bounds.get("above")
    found = []
    for comparison, threshold in (("<", below), (">", above)):
        if threshold is not None:
            found.append(
                AlertRule(
                    name=f"{label} {comparison} {threshold:g}",
                    metric=metric,
                    comparison=comparison,  # type: ignore[arg-type]  # one of the two above
                    threshold=threshold,
                    patience=3,
                    also=(ENOUGH_FRAMES, WARM) if metric.startswith("codebook/") else (),
                    message=f"{label} is {{value}}",
                )
            )
    return tuple(found)


STRICT: tuple[AlertRule, ...] = (
    *BUILT_IN,
    *_bounds("codebook/utilization", "utilization", below=0.40, above=0.95),
    *_bounds("codebook/perplexity_fraction", "perplexity over codes", below=50 / 256),
    *_bounds("codebook/dead", "share of dead codes", above=0.40),
    *_bounds("reconstruction/snr_db", "SNR in dB", below=10.0),
    *_bounds("reconstruction/cosine", "cosine of reconstruction and signal", below=0.8),
    *_bounds("optim/grad_norm", "gradient norm", below=1e-6, above=10.0),
)
"""The built-in rules and every critical bound of the monitoring table, taken literally.

Two of these bounds mislead on healthy runs: full use of the codes is what a good quantizer does,
and the SNR that can be had depends on the recordings.
"""

RULE_SETS = {"default": BUILT_IN, "strict": STRICT}
