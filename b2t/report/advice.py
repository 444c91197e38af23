"""What to try next: the debugging guide applied to a run."""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from b2t.monitor.health import TABLE
from b2t.monitor.rules import COLLAPSED
from b2t.report.run_data import RunData

_FEW_CODES = 2.0
"""Perplexity of a layer below which all its frames are as good as on one code."""

_SPIKE = 10.0
"""Gradient norm from which gradients count as exploding."""


@dataclass(frozen=True)
class Advice:
    """One thing to try.

    Attributes:
        symptom: what was seen.
        cause: what it probably means.
        remedy: what to do.
    """

    symptom: str
    cause: str
    remedy: str


def advise(run: RunData) -> list[Advice]:
    """Apply the debugging guide to the most recent values; the most urgent first.

    Configuration keys in a remedy are followed by what they are set to in this run.
    """
    latest = run.latest()
    bad = [
        row
        for row in sorted(TABLE, key=lambda row: not row.decides)
        if row.grade(latest.get(row.metric)) in ("concerning", "critical")
        and (row.decides or not _stuck(run))
    ]
    codes = [row for row in bad if row.metric.startswith("codebook/")]
    rows = [codes, *([row] for row in bad if row not in codes)]
    found = _guide(run, latest)
    found += [
        Advice(
            "; ".join(f"{r.label}: {r.show(latest[r.metric])} (healthy {r.span()})" for r in group),
            group[0].note,
            group[0].remedy,
        )
        for group in rows
        if group
    ]
    return [Advice(a.symptom, a.cause, with_settings(a.remedy, run)) for a in found]


def with_settings(text: str, run: RunData) -> str:
    """Put the run's own value behind each configuration key; `phases.*` becomes its last phase."""
    text = text.replace("phases.*.", f"phases.{_phase_number(run)}.")

    def setting(match: re.Match[str]) -> str:
        value = run.setting(match[0])
        plain = isinstance(value, (bool, int, float, str))
        return f"{match[0]} (now {_show(value)})" if plain else match[0]

    return re.sub(r"[a-z_]+(?:\.[a-z_0-9]+)+(?!\S*=)", setting, text)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _phase_number(run: RunData) -> int:
    names = [phase.get("name") for phase in run.config.get("phases") or []]
    last = run.steps[-1].get("phase") if run.steps else None
    return names.index(last) if last in names else 0


def _guide(run: RunData, latest: dict[str, float]) -> list[Advice]:
    found = _collapse(run, latest)
    ratio = latest.get("loss/vq_ratio", 0.0)
    if ratio > 2 and latest.get("loss/reconstruction", math.inf) < 0.3:
        found.append(
            Advice(
                "high VQ loss, low reconstruction loss",
                "commitment too strong",
                "phases.*.losses.commitment towards 0.1",
            )
        )
    if _stuck(run):
        found.append(
            Advice(
                "the reconstruction loss has hardly moved since its first quarter",
                "decoder too small, or signals that are mostly noise",
                "a larger model.signal_decoder.depth or model.encoder.dim; the same model with "
                "model.quantizer.enabled=false shows how much the signals allow",
            )
        )
    found += _of_scores(run)
    skipped = latest.get("optim/skipped_steps", 0.0)
    last = run.steps[-1]["step"] if run.steps else 0
    if last and skipped > 0.05 * last:
        found.append(
            Advice(
                f"{skipped:.0f} optimizer steps were skipped",
                "gradients overflow in half precision",
                "bf16 where the GPU has it, or a lower phases.*.lr",
            )
        )
    return found


def _of_scores(run: RunData) -> list[Advice]:
    """What the scores of an evaluation suggest."""
    found = []
    wer, noise = run.evaluation.get("wer"), run.evaluation.get("wer_noise")
    odd, rows = run.evaluation.get("odd_trials") or 0, run.evaluation.get("rows") or 1
    untrained = run.evaluation.get("untrained") or []
    if odd:
        found.append(
            Advice(
                f"{odd} of {rows} evaluated trials are far louder or quieter than the training",
                "broken trials, or signals in another unit than those of the training",
                "`b2t inspect` shows a trial; prepare the data as for training",
            )
        )
    if wer is not None and "text_decoder" in untrained:
        found.append(
            Advice(
                f"WER {100 * wer:.0f} % is that of an untrained text decoder",
                "no phase before this model trained it (losses.generation above 0)",
                "train the phases that follow, then evaluate again",
            )
        )
    elif wer is not None and noise is not None and wer > 0.9 * noise and odd < 0.1 * rows:
        found.append(
            Advice(
                f"WER {100 * wer:.0f} % is hardly better than {100 * noise:.0f} % on noise",
                "the text decoder has learnt the language and not the brain",
                "train longer in the last phase; check that phonemes are learnt first (PER)",
            )
        )
    distinct = run.evaluation.get("distinct_ratio")
    if distinct is not None and distinct < 0.5:
        found.append(
            Advice(
                f"distinct outputs are {distinct:.2f} of the distinct targets",
                "the decoder falls back on a few sentences",
                "less dropout in the encoder, more steps, or a smaller text decoder",
            )
        )
    return found


def _collapse(run: RunData, latest: dict[str, float]) -> list[Advice]:
    """What lies behind codes that are not used, and behind gradients that explode."""
    found = []
    layers = [v for name, v in latest.items() if name.startswith("codebook/perplexity/")]
    low_use = latest.get("codebook/utilization_worst", 1.0) < 0.5
    off = "phases.*.revival".replace("*", str(_phase_number(run)))
    for key in (off, "model.quantizer.revival"):
        if low_use and run.setting(key) is False:
            found.append(
                Advice("codes that fell out of use stay unused", f"{key} is off", f"{key}=true")
            )
    use = latest.get(COLLAPSED.metric, 1.0)
    if layers and (min(layers) < _FEW_CODES or COLLAPSED.violated(use)):
        found.append(
            Advice(
                f"the frames of a layer crowd on few codes (perplexity {min(layers):.1f})",
                "learning rate too high: latents run away from the codes",
                "lower phases.*.lr, or lengthen phases.*.warmup_steps",
            )
        )
    spikes = [v for v in run.series("optim/grad_norm")[1] if v > _SPIKE]
    if len(spikes) > 1:
        found.append(
            Advice(
                f"gradient norms above {_SPIKE:g} in {len(spikes)} log steps, up to "
                f"{max(spikes):.3g}",
                "clipping not in force, or a learning rate too high",
                "check gradient_clipping in the DeepSpeed file; lower phases.*.lr or accumulate",
            )
        )
    return found


def _stuck(run: RunData) -> bool:
    _, values = run.series("loss/reconstruction")
    if len(values) < 12:
        return False
    quarter = len(values) // 4
    early, late = np.mean(values[quarter : 2 * quarter]), np.mean(values[-quarter:])
    return bool(late > 0.5 and late > 0.98 * early)
