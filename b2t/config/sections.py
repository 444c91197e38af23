"""The sections of a run, and the whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from b2t.config.alert_rules import AlertRule
from b2t.config.model import ModelConfig
from b2t.config.phases import PhaseConfig, default_phases
from b2t.data.options import AugmentOptions
from b2t.data.ramps import values_at
from b2t.model.options import SavedTextDecoderOptions
from b2t.options import NonNegative, Options, Positive, PositiveInt, Rate
from b2t.quantize.options import TemperatureOptions


class RunConfig(Options):
    """Where a run lives and what makes it reproducible."""

    dir: Path = Path("runs/default")
    """Run folder; everything the run writes goes below it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all randomness: initial weights, batch order, augmentation, dropout, k-means."""
    deterministic: bool = True
    """Take deterministic algorithms, so that one seed gives one result, and a run that was stopped
    and gone on too. A warning names what has none on a GPU."""

    @field_validator("dir", mode="before")
    @classmethod
    def _is_named(cls, value: object) -> object:
        if value is None or (isinstance(value, str) and not value.strip()):
            raise ValueError("give a folder, for example runs/first (. is the current one)")
        return value


class MoreDataConfig(Options):
    """A further dataset to train on."""

    path: str
    """As `data.path`; channels, rate and unit must be those of it."""
    weight: Positive = 1.0
    """How often each of its trials comes in an epoch; below 1 a part of them, drawn anew."""


class DataConfig(Options):
    """What to train on."""

    path: str | None = None
    """Prepared folder (`b2t prepare`), Hugging Face dataset id, or parquet glob."""
    train_split: str = "train"
    """Split that is trained on."""
    validation_split: str = "val"
    """Split that chooses the best model and stops early."""
    more: list[MoreDataConfig] = Field(default=[])
    """Further datasets that are trained on beside `path`, whose splits alone are validated on."""
    max_frames: PositiveInt | None = None
    """Time bins of a micro-batch at most, padding included; `train_micro_batch_size_per_gpu` is
    then the most trials. All ranks take equally many micro-batches; null counts trials alone."""
    sessions: Literal["mixed", "stratified"] = "mixed"
    """`stratified` deals the trials of each session evenly over neighbouring batches."""
    texts: list[str] = Field(default=[])
    """Text files, one sentence per line, whose spelling phases with `text_from: texts` learn beside
    that of the training trials: nobody need have said them."""
    max_text_tokens: PositiveInt = SavedTextDecoderOptions().max_tokens
    """Longest text in tokens, end token included; a longer one is an error."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes per rank; batches do not depend on it."""
    audit_seconds: NonNegative = 2.0
    """Time that looking for what is wrong with the data may take when a run starts (0 = none)."""
    augment: AugmentOptions = AugmentOptions()
    """Augmentation of training signals."""


class OptimConfig(Options):
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
    zero_on_one_rank: bool = False
    """Keep ZeRO also on one rank in float32, where it shares nothing: it copies each gradient three
    times and holds the weights twice."""


class CodebookStartConfig(Options):
    """When and from how much data the codebooks start."""

    after_steps: int | str = 300
    """Applied steps with the quantizer passed through, before k-means++ (3 % of all at least; short
    trainings learn signals faster with half of them), or a share of the first phase, such as 50%;
    at half of the steps or minutes of a first phase that has fewer."""
    frames_per_code: Positive = 16.0
    """Latent frames gathered over all ranks, per code."""

    @field_validator("after_steps", mode="before")
    @classmethod
    def _steps_or_share(cls, value: object) -> object:
        steps = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not steps and not re.fullmatch("[0-9]{1,2}%", str(value)):
            raise ValueError("expected a whole number of steps from 0, or a share such as 50%")
        return value


class EvaluationConfig(Options):
    """Validation during training and decoding after each phase."""

    every: PositiveInt = 500
    """Applied steps between validations; one more runs at the end of each phase."""
    max_trials: PositiveInt | None = None
    """Validation trials at most, spread evenly over the sessions; null means all."""
    decode_trials: Annotated[int, Field(ge=0)] = 256
    """Trials decoded freely after each phase, spread evenly over the sessions."""
    decode_every: Annotated[int, Field(ge=0)] = 0
    """Applied steps between free decodings within a phase, each with the validation that is due by
    then, so that `val/wer`, `val/cer` and `val/per` can choose the best model and stop early; 0
    decodes after each phase only."""
    batch_size: PositiveInt = 16
    """Trials per rank and forward."""
    max_new_tokens: PositiveInt = 128
    """Longest decoded text in tokens."""
    num_beams: PositiveInt = 1
    """Beams of the decoding (1 = greedy)."""


class CheckpointConfig(Options):
    """What is kept on disk, and when."""

    every: PositiveInt = 500
    """Applied steps between checkpoints; one more is written at the end of each phase."""
    keep: PositiveInt = 2
    """Number of most recent checkpoints kept, besides the best model and the end of each phase."""
    best_metric: str = "val/loss"
    """Validation metric that chooses `checkpoints/best`; `val/loss` in phases that lack it."""
    best_mode: Literal["min", "max"] = "min"
    """Whether less or more of it is better."""


class WandbConfig(Options):
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
    tags: list[str] = Field(default=[])
    """Tags."""


class ProfileConfig(Options):
    """A look inside, written below `profile/` of the run folder by every rank."""

    steps: Annotated[int, Field(ge=0)] = 0
    """Steps that torch's profiler traces, with the operators that took longest; 0 traces none."""
    after: Annotated[int, Field(ge=0)] = 20
    """Applied steps before them, from the start or the resume on."""
    memory: bool = False
    """Record what allocates GPU memory, and write a snapshot when it runs out."""
    collectives: bool = False
    """Remember the last collectives, and write them when a rank has waited too long for the others
    (NCCL's flight recorder; gloo's on CPU ranks)."""


class LogConfig(Options):
    """What is printed and recorded."""

    every: PositiveInt = 50
    """Applied steps between log lines and records of metrics.jsonl."""
    progress: bool = True
    """Progress bar with the time left, on a terminal."""
    report: bool = True
    """Write the HTML report when the run warns and when it ends (as `b2t report` does)."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    profile: ProfileConfig = ProfileConfig()
    """Traces of steps, memory and collectives."""


class MonitorConfig(Options):
    """Monitors hooked to the engine step, and the alert rules on what they say."""

    enabled: bool = True
    """False leaves only the losses and the codebooks' use."""
    window: PositiveInt = 100
    """Applied steps that windowed metrics look back on."""
    rules: Literal["default", "strict"] = "default"
    """Built-in alert rules; strict adds every critical bound of the monitoring table."""
    extra_rules: list[AlertRule] = Field(default=[])
    """Rules of your own; one with the name of a built-in rule replaces it."""
    disabled_rules: list[str] = Field(default=[])
    """Names of built-in rules that stay silent."""


class StabilityConfig(Options):
    """When a run that no longer learns is ended."""

    max_consecutive_skips: PositiveInt = 50
    """Optimizer steps in a row that may be skipped for non-finite gradients."""
    collective_timeout_s: Positive = 1800.0
    """Seconds that a rank waits for the others before the run is ended."""
    dry_batch: bool = True
    """Before the first step, try the longest trials in every phase: too little memory shows at
    once."""


class Config(Options):
    """Everything that defines a run, besides the DeepSpeed file."""

    run: RunConfig = RunConfig()
    """Folder and seed."""
    data: DataConfig = DataConfig()
    """Dataset, batches, augmentation."""
    model: ModelConfig = ModelConfig()
    """Architecture."""
    optim: OptimConfig = OptimConfig()
    """Optimizer."""
    phases: list[PhaseConfig] = Field(default_factory=default_phases, min_length=1)
    """Phases, in order."""
    temperature: TemperatureOptions = TemperatureOptions()
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

    @model_validator(mode="after")
    def _phases_augment(self) -> Config:
        for number, phase in enumerate(self.phases):
            if fixed := [name for name in phase.augment if name.startswith("smoothing")]:
                raise ValueError(
                    f"phases.{number}.augment.{fixed[0]}: smoothing belongs to the model's input "
                    f"and is the same in all phases; set data.augment.{fixed[0]}"
                )
            where = f"phases.{number}.augment"
            try:
                for step in (0, phase.steps):  # what lies between is no less in range
                    self.augment_of(number, step)
            except ValidationError as error:
                item = error.errors()[0]
                message = item["msg"].removeprefix("Value error, ")
                raise ValueError(
                    f"{'.'.join([where, *map(str, item['loc'])])}: {message}"
                ) from None
            except ValueError as error:
                raise ValueError(f"{where}.{error}") from None
        return self

    def augment_of(self, phase: int, step: int = 0) -> AugmentOptions:
        """Return the augmentation of a phase, by number, after so many of its steps."""
        chosen = self.phases[phase]
        given = values_at(chosen.augment, step, chosen.steps)
        return AugmentOptions(**{**self.data.augment.model_dump(), **given})

    @property
    def total_steps(self) -> int:
        """Applied steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    @property
    def codebooks_start_after(self) -> int:
        """Applied steps before the codebooks start, always within the first phase."""
        after, steps = self.codebook_start.after_steps, self.phases[0].steps
        if isinstance(after, str):
            return steps * int(after.removesuffix("%")) // 100
        return after if after < steps else steps // 2

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML, in the order of the fields."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
