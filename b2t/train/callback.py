"""Hooks around the engine step, and what they see of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from b2t.config import Config, PhaseConfig
from b2t.evaluate.results import Prediction
from b2t.model.brain_to_text import BrainToText
from b2t.monitor.alerts import Alert
from b2t.monitor.context import StepContext
from b2t.train.build import Materials
from b2t.train.checkpoint import CheckpointStore
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.engine import PhaseEngine
from b2t.train.progress import Progress
from b2t.train.ranks import Ranks
from b2t.train.step_clock import StepClock
from b2t.train.stopping import StopRequests
from b2t.train.window import Window


class Run(Protocol):
    """What hooks see of the `Trainer` that calls them.

    Attributes:
        config: the resolved configuration.
        ds_file: the checked DeepSpeed file.
        materials: data, tokenizer, model.
        ranks: this process among all.
        model: what is trained.
        progress: where the run is.
        store: its checkpoints.
        callbacks: hooks of whoever made the run, in order.
        window: sums since the last record.
        clock: of the time that steps take.
        averages: averaged weights by name, as `collect_averages` left them.
        masters: exact float32 weights by name, as the last collection left them.
        outcome: how it goes or went, for `status.json`.
        stops: requests to stop, for hooks that take long.
    """

    config: Config
    ds_file: DeepSpeedFile
    materials: Materials
    ranks: Ranks
    model: BrainToText
    progress: Progress
    store: CheckpointStore
    callbacks: list[Callback]
    window: Window
    clock: StepClock
    averages: dict[str, Tensor]
    masters: dict[str, Tensor]
    outcome: str
    stops: StopRequests

    @property
    def phase(self) -> PhaseConfig:
        """The phase that is being trained."""

    @property
    def engine(self) -> PhaseEngine:
        """Its engine."""

    def seconds_left(self, step_s: float) -> float:
        """Estimate of the training time left, in seconds, at this pace."""

    def hook(self, name: str, *arguments: Any) -> None:
        """Call a hook of all callbacks, in order."""

    def raise_alert(self, alert: Alert) -> None:
        """Tell all hooks; a critical alert ends the run at the end of this step."""

    def evaluated(self) -> AbstractContextManager[None]:
        """Whole weights inside, the averaged ones where there are any. Collective."""

    def gather_averages(self) -> Mapping[str, Tensor]:
        """Return the averages of this moment on rank 0; anything elsewhere. Collective."""

    def collect_averages(self) -> Mapping[str, Tensor]:
        """Bring `averages` up to date and return it. Collective."""


class Callback:
    """Base of hooks; each does nothing until overridden.

    All ranks call all hooks in the same order, so that a hook may use collectives. Hooks must not
    wait for the device outside `on_log`. Where a hook fails, training goes on: see
    `b2t/train/guard.py`.

    Attributes:
        collective: the hook meets the other ranks inside; an error there ends the run, because the
            others would wait.
        key: names the hook's state in checkpoints, once for all; a hook that keeps one has it.
    """

    collective = False
    key: str | None = None

    def on_start(self, trainer: Run) -> None:
        """Before the first step, after a resume."""

    def on_step(self, trainer: Run, context: StepContext) -> None:
        """After each applied step."""

    def on_log(self, trainer: Run, record: dict[str, float]) -> None:
        """At each log step, with the metrics since the last one; may add to them."""

    def after_step(self, trainer: Run, last: bool) -> None:
        """After `on_step` and `on_log` of all hooks; `last` is the last step planned of a phase."""

    def on_scores(self, trainer: Run, metrics: Mapping[str, float], fresh: bool) -> None:
        """Before `on_eval`, with all metrics that choose a model.

        `fresh` is False where this step was validated before, and only decoded now.
        """

    def on_eval(self, trainer: Run, metrics: dict[str, float]) -> None:
        """After each validation, with its metrics."""

    def on_decode(self, trainer: Run, predictions: Sequence[Prediction]) -> None:
        """After free decoding, with the predictions of all ranks."""

    def before_phase_end(self, trainer: Run) -> None:
        """After the last step of a phase, with its weights still in the engine."""

    def on_phase_end(self, trainer: Run, phase: PhaseConfig) -> None:
        """After the last step, validation and decoding of a phase."""

    def on_alert(self, trainer: Run, alert: Alert) -> None:
        """When a rule fires."""

    def on_end(self, trainer: Run) -> None:
        """When the run leaves, finished or not."""

    def state_dict(self) -> dict[str, Any]:
        """State that a resume restores: JSON values, and tensors among them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
