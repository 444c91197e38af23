"""The configuration: pydantic sections, YAML presets, dotted overrides.

Every component is built from its own section and sees nothing else. Batch size, accumulation,
precision, ZeRO stage and gradient clipping belong to the DeepSpeed file (`b2t.train.ds_config`)
and have no key here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from b2t.errors import UserError
from b2t.monitor.alerts import AlertRule

Component = Literal[
    "adapter", "encoder", "quantizer", "signal_decoder", "phoneme_head", "text_decoder"
]
COMPONENTS: tuple[Component, ...] = get_args(Component)
"""Names of the parts of `BrainToText` that a phase can train or freeze."""

Schedule = Literal["cosine", "linear", "constant"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
PositiveInt = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, docstrings below fields are their help."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_assignment=True
    )


class RunConfig(Section):
    """Where a run lives and what makes it reproducible."""

    dir: Path = Path("runs/default")
    """Run folder; everything the run writes goes below it."""
    seed: int = 0
    """Seed of all randomness: initial weights, batch order, augmentation, dropout, k-means."""
    deterministic: bool = True
    """Ask torch for deterministic algorithms where they exist (a warning names the others)."""


class AugmentConfig(Section):
    """Augmentation of training signals; validation and test signals are never augmented."""

    enabled: bool = True
    """Switch for all of it."""
    time_shift_ms: NonNegative = 100.0
    """Largest shift of the signal in time, either way, in milliseconds."""
    channel_dropout: Rate = 0.10
    """Probability of silencing each channel for a whole trial."""
    noise_std: NonNegative = 0.01
    """Standard deviation of white noise, in units of the z-scored signal."""
    scale: tuple[Positive, Positive] = (0.9, 1.1)
    """Range of the factor that multiplies a whole trial."""
    time_masks: Annotated[int, Field(ge=0)] = 2
    """Number of spans of time set to zero."""
    time_mask_fraction: Rate = 0.05
    """Longest span of one time mask, as a fraction of the trial."""
    frequency_masks: Annotated[int, Field(ge=0)] = 1
    """Number of bands removed from the spectrum along time."""
    frequency_mask_fraction: Rate = 0.05
    """Widest removed band, as a fraction of 0 Hz to Nyquist."""
    offset_std: NonNegative = 0.0
    """Standard deviation of a constant offset per channel and trial."""
    smoothing_bins: NonNegative = 0.0
    """Standard deviation of Gaussian smoothing along time, in bins (0 = none)."""

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must be [low, high], found {list(self.scale)}")
        return self


class DataConfig(Section):
    """What to train on."""

    path: str | None = None
    """Prepared folder (`b2t prepare`), Hugging Face dataset id, or parquet glob."""
    train_split: str = "train"
    """Split that is trained on."""
    validation_split: str = "val"
    """Split that chooses the best model and stops early."""
    max_text_tokens: PositiveInt = 128
    """Longest text in tokens, end token included; a longer one is an error."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes per rank; batches do not depend on it."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of training signals."""


class AdapterConfig(Section):
    """Per-session affine map of the channels, identity at the start."""

    enabled: bool = True
    """Without it all sessions share the raw channels."""
    softsign: bool = False
    """Bound the adapted signal with x / (1 + |x|)."""
    dropout: Rate = 0.0
    """Dropout on the adapted signal."""


class EncoderConfig(Section):
    """Patches of the signal to latent frames."""

    kind: Literal["transformer", "conv", "gru"] = "transformer"
    """Pre-norm transformer with rotary positions, gated depthwise convolutions, or a GRU."""
    patch_size: PositiveInt = 4
    """Bins per patch."""
    patch_stride: PositiveInt = 4
    """Bins from one patch to the next, at most `patch_size`."""
    dim: PositiveInt = 512
    """Latent width D."""
    depth: Annotated[int, Field(ge=0)] = 6
    """Layers."""
    heads: PositiveInt = 8
    """Attention heads of a transformer; must divide `dim`."""
    mlp_ratio: Positive = 4.0
    """Width of the feed-forward layer over `dim`; a GRU has none."""
    dropout: Rate = 0.1
    """Dropout in attention or convolution output and feed-forward; between layers of a GRU."""
    kernel_size: Annotated[int, Field(ge=1)] = 15
    """Frames that a convolution looks at, an odd number."""
    bidirectional: bool = False
    """Whether a GRU reads both ways, `dim` / 2 units each; one that does not can stream."""

    @model_validator(mode="after")
    def _consistent(self) -> EncoderConfig:
        if self.kind == "conv" and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} must be odd, to look both ways alike")
        if self.kind == "gru" and self.bidirectional and self.dim % 2:
            raise ValueError(f"dim {self.dim} must be even to be read both ways")
        if self.kind == "transformer" and self.dim % (2 * self.heads):
            raise ValueError(
                f"dim {self.dim} over heads {self.heads} must give an even whole number "
                "(rotary positions turn pairs)"
            )
        if self.patch_stride > self.patch_size:
            raise ValueError(
                f"patch_stride {self.patch_stride} above patch_size {self.patch_size} skips bins"
            )
        return self


class QuantizerConfig(Section):
    """Residual vector quantizer; names follow vector-quantize-pytorch where meanings agree."""

    enabled: bool = True
    """False trains the same model without a quantizer, the yardstick for its cost in SNR."""
    num_quantizers: PositiveInt = 8
    """Layers Q."""
    codebook_size: Annotated[int, Field(ge=2)] = 8192
    """Codes K of each layer."""
    codebook_dim: PositiveInt | None = None
    """Width of a code; narrower than the latent adds projections, null means the latent's width."""
    update_rule: Literal["ema", "gradient"] = "ema"
    """How codes move: averages of their frames, or a codebook loss through the optimizer."""
    decay: Rate = 0.98
    """Decay of the running averages; 0.95 suits fewer than 256 codes, 0.98 more."""
    eps: Positive = 1e-5
    """Pseudo-frames added to the average count of each code (Laplace smoothing)."""
    use_cosine_sim: bool = False
    """Nearest by angle instead of distance."""
    rotation_trick: bool = True
    """Gradient to the encoder by rotation of the whole quantized sum; false: straight through."""
    quantize_dropout: bool = False
    """Train with a random number of the first layers, the same on all ranks."""
    shared_codebook: bool = False
    """One codebook for all layers."""
    revival: bool = True
    """Replace codes that fall out of use; a phase can switch it off."""
    revival_threshold: NonNegative = 0.3
    """A code is dead below this fraction of uniform use."""
    revival_every: PositiveInt = 5
    """Applied steps between revivals."""
    stochastic_sample_codes: bool = False
    """Sample codes in training at the current temperature (Gumbel) instead of the nearest."""
    beam_size: PositiveInt = 1
    """Sums of codes kept from layer to layer in training; 1: the nearest code of each layer."""
    eval_beam_size: PositiveInt | None = None
    """The same in evaluation, null means `beam_size`; more: better signals, slower encoding."""


class SignalDecoderConfig(Section):
    """Quantized latents back to the signal."""

    dim: PositiveInt | None = None
    """Width, null means the encoder's."""
    depth: Annotated[int, Field(ge=0)] = 4
    """Transformer layers."""
    heads: PositiveInt = 8
    """Attention heads."""
    mlp_ratio: Positive = 4.0
    """Width of the feed-forward layer over `dim`."""
    dropout: Rate = 0.0
    """Dropout in attention output and feed-forward."""


class PhonemeHeadConfig(Section):
    """CTC over phonemes from the quantized latents; used where the data has phonemes."""

    enabled: bool = True
    """Build the head."""
    dropout: Rate = 0.1
    """Dropout before the projection to classes."""


class TextDecoderConfig(Section):
    """Text from quantized latents by cross-attention: a transformers sequence-to-sequence model."""

    enabled: bool = True
    """False trains a tokenizer of signals only; automatic where the data has no text."""
    checkpoint: str | None = None
    """Local folder or Hub id of a sequence-to-sequence model; null trains a small one."""
    config: dict[str, Any] | None = None
    """A transformers config as a mapping with `model_type`, trained from scratch."""
    tokenizer: Literal["byte", "bpe"] = "byte"
    """Tokens of a model trained from scratch; a checkpoint brings its own."""
    bpe_vocab_size: Annotated[int, Field(ge=260)] = 2000
    """Tokens of the BPE tokenizer, learnt on the training texts."""
    dim: PositiveInt = 512
    """Width of the small decoder."""
    depth: PositiveInt = 6
    """Layers of the small decoder."""
    heads: PositiveInt = 8
    """Attention heads of the small decoder."""
    ffn_dim: PositiveInt = 2048
    """Feed-forward width of the small decoder."""
    dropout: Rate = 0.1
    """Dropout of the small decoder."""


class CheckpointingConfig(Section):
    """Activation checkpointing per component: every n-th layer is recomputed, 0 is off."""

    encoder: Annotated[int, Field(ge=0)] = 1
    """Encoder layers."""
    signal_decoder: Annotated[int, Field(ge=0)] = 1
    """Signal decoder layers."""
    text_decoder: Annotated[int, Field(ge=0)] = 1
    """Text decoder layers (transformers recomputes all of them: 0 or 1)."""


class ModelConfig(Section):
    """The sections of `BrainToText`."""

    adapter: AdapterConfig = AdapterConfig()
    """Per-session affine map."""
    encoder: EncoderConfig = EncoderConfig()
    """Signal to latents."""
    quantizer: QuantizerConfig = QuantizerConfig()
    """Latents to codes."""
    signal_decoder: SignalDecoderConfig = SignalDecoderConfig()
    """Codes to signal."""
    phoneme_head: PhonemeHeadConfig = PhonemeHeadConfig()
    """Codes to phonemes."""
    text_decoder: TextDecoderConfig = TextDecoderConfig()
    """Codes to text."""
    activation_checkpointing: CheckpointingConfig = CheckpointingConfig()
    """Recompute activations in backward to save memory."""


class OptimConfig(Section):
    """AdamW; the learning rate and its schedule are set per phase."""

    betas: tuple[Rate, Rate] = (0.9, 0.98)
    """Decay of the running mean and of the running square of gradients."""
    eps: Positive = 1e-8
    """Added to the root of the running square."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay, never on norms, biases, embeddings of sessions or codebooks."""
    weight_ema: Rate | None = None
    """Decay of a running average of the weights (0.999 is usual) that validation, decoding and
    the best model use instead of the weights; null for none."""


class LossWeights(Section):
    """Weights of the total loss; 0 leaves a loss out and its computation too."""

    generation: NonNegative = 1.0
    """Cross entropy of the text."""
    reconstruction: NonNegative = 0.5
    """Squared error of the signal."""
    commitment: NonNegative = 0.2
    """Distance of latents to their codes."""
    diversity: NonNegative = 0.1
    """KL of the mean soft assignment to uniform."""
    perplexity: NonNegative = 0.05
    """1 − exp(H)/K of the mean soft assignment."""
    phoneme: NonNegative = 0.3
    """CTC on phonemes, where there are any."""


class EarlyStoppingConfig(Section):
    """End a phase when a validation metric stops improving; the next phase then begins."""

    metric: str = "val/loss"
    """Name of the metric as in metrics.jsonl."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more is better."""
    patience: PositiveInt = 5
    """Evaluations without improvement before the phase ends."""
    min_delta: NonNegative = 0.0
    """Smallest change that counts as an improvement."""


class TemperatureConfig(Section):
    """Temperature of soft assignments over training or one phase, in units of the mean distance."""

    start: Positive = 2.0
    """At the first step."""
    end: Positive = 0.5
    """At the last step."""
    schedule: Literal["cosine", "linear", "exponential"] = "cosine"
    """Course between them."""


class PhaseConfig(Section):
    """One phase: what trains, on which losses, how fast, for how long."""

    name: str
    """Unique name, used in logs and checkpoints."""
    steps: PositiveInt
    """Applied optimizer steps; skipped ones do not count."""
    trainable: list[Component] = list(COMPONENTS)
    """Components that train; the others are frozen, exactly, and have no optimizer state."""
    losses: LossWeights = LossWeights()
    """Weights of the total loss."""
    lr: Positive = 3e-4
    """Peak learning rate."""
    lr_scale: dict[Component, NonNegative] = {}
    """Factor on `lr` for single components."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    """Applied steps of linear warm-up from 0 to the peak."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after warm-up."""
    component_schedule: dict[Component, Schedule] | None = None
    """Another course for single components."""
    component_warmup_steps: dict[Component, Annotated[int, Field(ge=0)]] | None = None
    """Another warm-up for single components."""
    min_lr_fraction: Fraction = 0.1
    """Where the decay ends, as a fraction of `lr`."""
    revival: bool = True
    """Whether dead codes are revived."""
    exact_regularizers: bool = True
    """With accumulation, diversity and perplexity of the whole step, for one more encoder pass
    without gradient; false takes them over each micro-batch."""
    early_stopping: EarlyStoppingConfig | None = None
    """Rule that ends the phase before its last step."""
    temperature: TemperatureConfig | None = None
    """Range of the temperature within this phase; null follows `temperature` over the training."""
    evaluate_every: PositiveInt | None = None
    """Applied steps between validations in this phase; null means `evaluation.every`."""
    decode_trials: Annotated[int, Field(ge=0)] | None = None
    """Trials decoded freely after this phase; null means `evaluation.decode_trials`."""

    @field_validator("trainable")
    @classmethod
    def _something_trains(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("a phase must train at least one component")
        return value


class CodebookStartConfig(Section):
    """When and from how much data the codebooks start."""

    after_steps: Annotated[int, Field(ge=0)] = 300
    """Applied steps with the quantizer passed through, before k-means++ (3 % is a good start)."""
    frames_per_code: Positive = 16.0
    """Latent frames gathered over all ranks, per code."""


class EvaluationConfig(Section):
    """Validation during training and decoding after each phase."""

    every: PositiveInt = 500
    """Applied steps between validations; one more runs at the end of each phase."""
    max_trials: PositiveInt | None = None
    """Validation trials at most, spread evenly over the sessions; null means all."""
    decode_trials: Annotated[int, Field(ge=0)] = 256
    """Trials decoded freely after each phase, spread evenly over the sessions."""
    batch_size: PositiveInt = 16
    """Trials per rank and forward."""
    max_new_tokens: PositiveInt = 128
    """Longest decoded text in tokens."""
    num_beams: PositiveInt = 1
    """Beams of the decoding (1 = greedy)."""


class CheckpointConfig(Section):
    """What is kept on disk, and when."""

    every: PositiveInt = 500
    """Applied steps between checkpoints; one more is written at the end of each phase."""
    keep: PositiveInt = 2
    """Number of most recent checkpoints kept, besides the best model and the end of each phase."""
    best_metric: str = "val/loss"
    """Validation metric that chooses `checkpoints/best`."""
    best_mode: Literal["min", "max"] = "min"
    """Whether less or more of it is better."""


class WandbConfig(Section):
    """Weights & Biases; `WANDB_MODE=offline` needs no network."""

    enabled: bool = False
    """Log to WandB as well as to metrics.jsonl."""
    project: str = "b2t"
    """Project."""
    entity: str | None = None
    """Team or user."""
    group: str | None = None
    """Group of runs."""
    name: str | None = None
    """Name of the run, null means the run folder's."""
    tags: list[str] = []
    """Tags."""


class LogConfig(Section):
    """What is printed and recorded."""

    every: PositiveInt = 50
    """Applied steps between log lines and records of metrics.jsonl."""
    progress: bool = True
    """Progress bar with the time left, on a terminal."""
    report: bool = True
    """Write the HTML report when the run warns and when it ends (as `b2t report` does)."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""


class MonitorConfig(Section):
    """Monitors hooked to the engine step, and the alert rules on what they say."""

    enabled: bool = True
    """False leaves only the losses and the codebooks' use."""
    window: PositiveInt = 100
    """Applied steps that windowed metrics look back on."""
    rules: Literal["default", "strict"] = "default"
    """Built-in alert rules; strict adds every critical bound of the monitoring table."""
    extra_rules: list[AlertRule] = []
    """Rules of your own; one with the name of a built-in rule replaces it."""
    disabled_rules: list[str] = []
    """Names of built-in rules that stay silent."""


class StabilityConfig(Section):
    """When a run that no longer learns is ended."""

    max_consecutive_skips: PositiveInt = 50
    """Optimizer steps in a row that may be skipped for non-finite gradients."""
    collective_timeout_s: Positive = 1800.0
    """Seconds that a rank waits for the others before the run is ended."""
    dry_batch: bool = True
    """Before the first step, try the longest trials in every phase: too little memory shows at
    once."""


def _default_phases() -> list[PhaseConfig]:
    """The three phases of the house: tokenizer, codebook, everything."""
    tokenizer: list[Component] = [
        "adapter",
        "encoder",
        "quantizer",
        "signal_decoder",
        "phoneme_head",
    ]
    return [
        PhaseConfig(
            name="tokenizer",
            steps=10_000,
            trainable=tokenizer,
            losses=LossWeights(
                generation=0.0, reconstruction=1.0, commitment=0.2, diversity=0.1, perplexity=0.05
            ),
        ),
        PhaseConfig(
            name="codebook",
            steps=5_000,
            trainable=["quantizer", "signal_decoder", "phoneme_head", "text_decoder"],
            losses=LossWeights(
                generation=1.0, reconstruction=0.5, commitment=0.2, diversity=0.5, perplexity=0.25
            ),
            warmup_steps=500,
        ),
        PhaseConfig(name="joint", steps=20_000),
    ]


class Config(Section):
    """Everything that defines a run, besides the DeepSpeed file."""

    run: RunConfig = RunConfig()
    """Folder and seed."""
    data: DataConfig = DataConfig()
    """Dataset, batches, augmentation."""
    model: ModelConfig = ModelConfig()
    """Architecture."""
    optim: OptimConfig = OptimConfig()
    """Optimizer."""
    phases: list[PhaseConfig] = Field(default_factory=_default_phases, min_length=1)
    """Phases, in order."""
    temperature: TemperatureConfig = TemperatureConfig()
    """Temperature of soft assignments."""
    codebook_start: CodebookStartConfig = CodebookStartConfig()
    """Start of the codebooks."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Validation and decoding."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    log: LogConfig = LogConfig()
    """Log lines, metrics, WandB."""
    monitor: MonitorConfig = MonitorConfig()
    """Monitors and alerts."""
    stability: StabilityConfig = StabilityConfig()
    """Limits on trouble."""

    @model_validator(mode="after")
    def _phases_are_distinct(self) -> Config:
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phases must have distinct names, found {names}")
        return self

    @property
    def total_steps(self) -> int:
        """Applied steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML, in the order of the fields."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def preset_names() -> list[str]:
    """Names accepted by `--config` besides paths."""
    files = resources.files("b2t.presets").iterdir()
    return sorted(Path(f.name).stem for f in files if f.name.endswith(".yaml"))


def load_config(source: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a preset or a YAML file and apply dotted overrides.

    Args:
        source: name of a preset, path of a YAML file, or None for the defaults.
        overrides: `section.key=value`; list items by number (`phases.0.steps=200`); values are
            YAML.

    Raises:
        UserError: on an unreadable file, a misspelt key or a bad value.
    """
    tree = _read_yaml(source) if source is not None else {}
    where = str(source) if source is not None else "the defaults"
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, where)) from None


class _DistinctKeys(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys in silence: here they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; raise where a key appears twice."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} appears twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if str(source) in preset_names():
        text = resources.files("b2t.presets").joinpath(f"{source}.yaml").read_text("utf-8")
    elif path.is_file():
        text = path.read_text("utf-8")
    else:
        names = preset_names()
        hint = difflib.get_close_matches(str(source), names, n=1)
        raise UserError(
            f"--config {source}: neither a file nor a preset"
            + (f"; did you mean {hint[0]}?" if hint else "")
            + f" Presets: {', '.join(names)}."
        )
    try:
        tree = yaml.load(text, _DistinctKeys)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(
            f"{source}: expected a mapping of sections ({', '.join(Config.model_fields)}), "
            f"found a {type(tree).__name__}"
        )
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in a tree of mappings and lists."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(
            f"override {override!r}: expected section.key=value, for example "
            "phases.0.steps=200 or data.path=prepared/"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}") from None
    keys = dotted.split(".")
    if keys[0] == "phases" and "phases" not in tree:
        tree["phases"] = [phase.model_dump(mode="json") for phase in _default_phases()]
    node: Any = tree
    for key, following in pairwise(keys):
        if isinstance(node, list):
            node = node[_index(node, key, dotted)]
        else:
            if not isinstance(node.get(key), (dict, list)):
                node[key] = [] if following.isdigit() else {}
            node = node[key]
    if isinstance(node, list):
        node[_index(node, keys[-1], dotted)] = value
    else:
        node[keys[-1]] = value


def _index(node: list[Any], key: str, dotted: str) -> int:
    if not node:
        raise UserError(
            f"override {dotted}: the list is not set in the file, so it has no position {key!r}; "
            f"give it whole, as {dotted.rpartition('.')[0]}=[…]"
        )
    if not key.isdigit() or int(key) >= len(node):
        raise UserError(
            f"override {dotted}: {key!r} is not a position in a list of {len(node)} items; "
            f"expected 0 to {len(node) - 1}"
        )
    return int(key)


def _explain(error: ValidationError, where: str) -> str:
    """Turn pydantic's report into lines that name key, value, expectation and nearest key."""
    lines = []
    for item in error.errors():
        dotted = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _keys_at(item["loc"][:-1])
            wrong = str(item["loc"][-1])
            close = difflib.get_close_matches(wrong, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            owner = _DEEPSPEED_KEYS.get(wrong)
            if owner and not close:
                hint = f"the DeepSpeed file sets this, as {owner!r}"
            lines.append(f"{dotted}: unknown key; {hint}")
        else:
            # A rule between keys names the values itself; a whole section would drown it.
            whole = item["type"] == "missing" or isinstance(item["input"], (dict, BaseModel))
            found = "" if whole else f", found {item['input']!r}"
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{dotted or 'configuration'}: {message}{found}")
    return f"{where}: " + ("\n  " if len(lines) > 1 else "") + "\n  ".join(lines)


_DEEPSPEED_KEYS = {
    "batch_size": "train_micro_batch_size_per_gpu",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "accumulation": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "fp16": "fp16.enabled",
    "bf16": "bf16.enabled",
    "precision": "fp16.enabled or bf16.enabled",
    "zero_stage": "zero_optimization.stage",
    "zero_optimization": "zero_optimization",
    "train_micro_batch_size_per_gpu": "train_micro_batch_size_per_gpu",
    "clip": "gradient_clipping",
    "gradient_clipping": "gradient_clipping",
}


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """Keys of the section that a location of pydantic's report points to."""
    section: Any = Config
    for part in location:
        if isinstance(part, int):
            section = get_args(section)[0]
            continue
        section = section.model_fields[part].annotation
        if get_origin(section) not in (None, list):
            sections = [a for a in get_args(section) if isinstance(a, type)]
            section = next((a for a in sections if issubclass(a, Section)), section)
    return list(section.model_fields) if hasattr(section, "model_fields") else []


def describe(section: type[Section] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """List (dotted key, default, help) of every field, for `--help-config`."""
    rows: list[tuple[str, str, str]] = []
    for name, field in section.model_fields.items():
        inner: Any = field.annotation
        item = get_args(inner)[0] if get_origin(inner) is list else None
        if isinstance(item, type) and issubclass(item, Section):
            rows += describe(item, f"{prefix}{name}.0.")
        elif isinstance(inner, type) and issubclass(inner, Section):
            rows += describe(inner, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else _plain(field.default)
            rows.append((prefix + name, default, " ".join((field.description or "").split())))
            for part in get_args(inner):
                if isinstance(part, type) and issubclass(part, Section):
                    rows += describe(part, f"{prefix}{name}.")
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        return str(value.model_dump(mode="json"))
    return str(value) if isinstance(value, (Mapping, list, tuple, Path)) else repr(value)
