"""Results of an evaluation: what was said of every trial, and the scores of a split."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from b2t.evaluate import metrics
from b2t.records import finite, write_atomically
from b2t.run_files import EVALUATION_FILE, PREDICTIONS_FILE, TRACES_FILE, USAGE_FILE


@dataclass
class Prediction:
    """What was said and what was meant for one row; None where the row or model lacks it.

    `prediction` is what the text decoder says, `lm_prediction` what a lexicon and a language model
    read from the phonemes, `joint_prediction` what all of them say together by joint scores;
    `noise_*`, `lm_noise_*` and `joint_noise_*` are the same of noise, `controls` of other controls
    (`phonemes`, `words` by language model, `joint`, `text`). The trial lasts `seconds`.
    """

    row: str
    session: str
    seconds: float | None = None
    target: str | None = None
    prediction: str | None = None
    noise_prediction: str | None = None
    lm_prediction: str | None = None
    lm_noise_prediction: str | None = None
    joint_prediction: str | None = None
    joint_noise_prediction: str | None = None
    target_phonemes: list[int] | None = None
    phonemes: list[int] | None = None
    noise_phonemes: list[int] | None = None
    controls: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Evaluation:
    """Results of one split; fractions are fractions, None where a thing cannot be measured.

    Attributes:
        split: name of the split.
        checkpoint: which model of the run: `best`, `step 200` or a folder.
        role: what the split was to the training, `chose the model` or `trained on`; None where it
            was neither, or where that is not known.
        known_sentences: share of the rows with text whose sentence occurs in training.
        untrained: components of the model that no step has trained; what they say means nothing.
        odd_trials: trials far louder or quieter than the model's training signals.
        simulated: whether the recordings come from `b2t simulate`.
        rows, frames: trials and valid latent frames evaluated.
        per, cer, wer: pooled error rates; `*_interval` are 95 % bootstrap intervals over rows.
        per_noise, cer_noise, wer_noise: the same model fed noise of the same channel statistics.
        wer_lm, cer_lm: of the words that a lexicon and an n-gram model read from the phonemes (with
            `wer_lm_interval`, `wer_lm_noise`, `wer_lm_shuffled`, `exact_lm`).
        wer_joint, cer_joint: by joint scores of CTC, n-grams, text decoder and causal model, with
            the same companions.
        controls: error rates of other controls (`spectrum`: noise of equal spectrum, `codes`: codes
            in another order, `lm_alone`: the language model without phonemes), by field.
        prior: what the training texts alone suggest, see `b2t.evaluate.prior.text_prior`.
        details: kinds of errors, most confused units, rates by session and by length, and the
            permutation p-value, for `per`, `wer`, `wer_lm` and `wer_joint`.
        verdict: what is not decoded, see `b2t.evaluate.verdict`; None where every score beats its
            controls.
        words_per_minute: words of the targets over the duration of their trials.
        wer_shuffled: WER when each trial is decoded from another trial's signal, mean over
            random permutations.
        bleu, rouge1, rouge2, rougeL: overlap in 0–100.
        exact: share of sentences without an error.
        distinct_ratio: distinct predictions over distinct targets (`distinct_ratio_noise` under
            noise).
        utilization, perplexity: per quantizer layer; utilization is over min(codes, frames).
        codebook_size: codes per layer, K.
        snr_db, snr_median_db: signal-to-noise ratio of the reconstruction, pooled over bins and
            median over trials.
        mse, cosine: of the reconstruction, pooled.
        decoding: how text was generated.
        language_model: folder of the language model and the options of its search.
        notes: what was not measured, and why.
        predictions: one per row.
        usage: frames per code, [Q][K]; empty without a quantizer.
        traces: some signals beside their reconstruction, see `collect_traces`.
    """

    split: str
    checkpoint: str | None = None
    role: str | None = None
    known_sentences: float | None = None
    untrained: list[str] = field(default_factory=list)
    odd_trials: int = 0
    simulated: bool = False
    rows: int = 0
    frames: int = 0
    per: float | None = None
    cer: float | None = None
    wer: float | None = None
    per_interval: tuple[float, float] | None = None
    cer_interval: tuple[float, float] | None = None
    wer_interval: tuple[float, float] | None = None
    per_noise: float | None = None
    cer_noise: float | None = None
    wer_noise: float | None = None
    wer_shuffled: float | None = None
    wer_lm: float | None = None
    wer_lm_interval: tuple[float, float] | None = None
    wer_lm_noise: float | None = None
    wer_lm_shuffled: float | None = None
    cer_lm: float | None = None
    cer_lm_interval: tuple[float, float] | None = None
    cer_lm_noise: float | None = None
    exact_lm: float | None = None
    wer_joint: float | None = None
    wer_joint_interval: tuple[float, float] | None = None
    wer_joint_noise: float | None = None
    wer_joint_shuffled: float | None = None
    cer_joint: float | None = None
    cer_joint_interval: tuple[float, float] | None = None
    cer_joint_noise: float | None = None
    exact_joint: float | None = None
    controls: dict[str, dict[str, float | None]] = field(default_factory=dict)
    prior: dict[str, Any] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    verdict: str | None = None
    words_per_minute: float | None = None
    bleu: float | None = None
    rouge1: float | None = None
    rouge2: float | None = None
    rougeL: float | None = None  # noqa: N815  # the metric's own name
    exact: float | None = None
    distinct_ratio: float | None = None
    distinct_ratio_noise: float | None = None
    utilization: list[float] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)
    codebook_size: int | None = None
    snr_db: float | None = None
    snr_median_db: float | None = None
    mse: float | None = None
    cosine: float | None = None
    decoding: dict[str, Any] = field(default_factory=dict)
    language_model: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list, repr=False)
    usage: list[list[int]] = field(default_factory=list, repr=False)
    traces: dict[str, Any] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values, no NaN and no infinity, without what is per row."""
        apart = ("predictions", "usage", "traces")
        record = {name: value for name, value in vars(self).items() if name not in apart}
        record["normalisation"] = metrics.NORMALISATION
        return finite(record)

    def scalars(self) -> dict[str, float]:
        """Return the finite numbers under flat names, for a log (`wer`, `utilization/0` …)."""
        flat: dict[str, float] = {}
        for name, value in self.to_dict().items():
            if isinstance(value, bool):
                continue
            if isinstance(value, (int, float)):
                flat[name] = float(value)
            elif name in ("utilization", "perplexity"):
                flat.update({f"{name}/{q}": v for q, v in enumerate(value) if v is not None})
        return flat

    def save(self, folder: Path) -> None:
        """Write `evaluation.json`, `predictions.jsonl`, and the usage and traces of the report.

        Each file is complete or not there at all.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(p), ensure_ascii=False) for p in self.predictions]
        write_atomically(folder / PREDICTIONS_FILE, "".join(line + "\n" for line in lines))
        usage_record = {"split": self.split, "counts": self.usage}
        write_atomically(folder / USAGE_FILE, json.dumps(usage_record) + "\n")
        write_atomically(folder / TRACES_FILE, json.dumps(finite(self.traces)) + "\n")
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / EVALUATION_FILE, text + "\n")
