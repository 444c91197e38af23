"""All checks of a dataset in one pass over its signals."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from b2t.data.trials import signal_lengths, spread_over_sessions, values_of
from b2t.evaluate.audit.channels import ChannelChecks
from b2t.evaluate.audit.findings import CRITICAL, NOTE, WARNING, Finding
from b2t.evaluate.audit.labels import Patches, check_frames, check_names, check_texts
from b2t.evaluate.audit.line_noise import LineNoiseCheck
from b2t.evaluate.audit.overlap import OverlapCheck
from b2t.evaluate.audit.reading import NotFinite, read_trials
from b2t.evaluate.audit.sentences import shared_sentences
from b2t.evaluate.audit.swapped import SwapCheck
from b2t.evaluate.audit.units import check_units

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AuditOptions:
    """How to look at a dataset.

    Attributes:
        nearness: of near sentences, in 0–1; 1 compares exactly, and fast.
        limit: trials of each split whose signals are read and texts are written; None takes all.
        seconds: no further signal is read after so long.
        patches: of the model; None where it is not known.
        tokenizer: of the text decoder; None writes no texts.
        max_tokens: longest text; None for any.
        progress: show a progress bar.
    """

    nearness: float = 0.8
    limit: int | None = None
    seconds: float | None = None
    patches: Patches | None = None
    tokenizer: "PreTrainedTokenizerBase" = None
    max_tokens: int | None = None
    progress: bool = False


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        splits: rows by split, training first.
        channels: C names.
        sampling_rate: in Hz.
        unit: of the signals, None where it is not known.
        overlap: share of a window that the next one repeats, as it was prepared.
        absent: channels that a source lacks, by its name; those known to be bad everywhere by "".
    """

    splits: Mapping[str, Dataset]
    channels: list[str]
    sampling_rate: float
    unit: str | None = None
    overlap: float = 0.0
    absent: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        splits: Mapping[str, Dataset],
        channels: int,
        sampling_rate: float,
        record: Mapping[str, Any],
    ) -> "Subject":
        """Describe splits by the record that `b2t prepare` wrote beside them, which may be {}."""
        known = list(splits)
        order = sorted(known, key=lambda split: (split != "train", known.index(split)))
        return cls(
            {split: splits[split] for split in order},
            record.get("channels") or [str(number) for number in range(channels)],
            sampling_rate,
            record.get("unit"),
            float(record.get("reading", {}).get("overlap", 0.0)),
            {
                **record.get("missing_channels", {}),
                "": (record.get("processing") or {}).get("bad_channels", []),
            },
        )


class Audit(NamedTuple):
    """What came out.

    Attributes:
        findings: of every check, notes included.
        trials: whose signals were read.
        deviations: typical standard deviation of each channel by session, [C].
        frequencies: of the spectra in Hz, [F].
        spectra: power by session, [F, C]; empty where the rate is too low for mains hum.
    """

    findings: list[Finding]
    trials: int
    deviations: dict[str, np.ndarray]
    frequencies: np.ndarray
    spectra: dict[str, np.ndarray]


def audit(subject: Subject, options: AuditOptions) -> Audit:
    """Look at a dataset.

    Args:
        subject: whose columns and types were checked; its values need not be finite.
        options: how closely.
    """
    names = subject.channels
    bins = sum(int(signal_lengths(dataset).sum()) for dataset in subject.splits.values())
    finite = NotFinite(names)
    channels = ChannelChecks(names, subject.absent)
    swapped = SwapCheck(names)
    hum = LineNoiseCheck(names, subject.sampling_rate)
    overlap = OverlapCheck(subject.splits, bins, len(names), subject.overlap)
    total = sum(min(len(rows), options.limit or len(rows)) for rows in subject.splits.values())
    read = 0
    trials = read_trials(subject.splits, options.limit, options.seconds)
    shown = None if options.progress else True
    for trial in tqdm(trials, total=total, desc="looking", unit="trial", disable=shown):
        read += 1
        if not trial.signal.size or not finite.accept(trial):
            continue
        for check in (channels, swapped, hum, overlap):
            check.add(trial)
    deviations = channels.deviations()
    findings = [check_names(subject.splits), *_texts(subject, options)]
    findings += [*overlap.findings(), finite.finding()]
    if deviations:
        findings += [*channels.findings(), swapped.finding(), hum.finding()]
        findings.append(check_units(deviations, names, subject.unit))
    findings.append(check_frames(subject.splits, options.patches))
    return Audit(findings, read, deviations, hum.frequencies, hum.spectra())


def _texts(subject: Subject, options: AuditOptions) -> list[Finding]:
    texts = {split: values_of(dataset, "text") for split, dataset in subject.splits.items()}
    findings = shared_sentences(texts, options.nearness)
    if options.tokenizer is not None:
        some = subject.splits
        if options.limit is not None:
            some = {s: d.select(spread_over_sessions(d, options.limit)) for s, d in some.items()}
        findings.append(check_texts(some, options.tokenizer, options.max_tokens))
    return findings


def verdict(findings: list[Finding]) -> str:
    """Say in a line what the findings come to."""
    bad = {
        level: list(dict.fromkeys(f.check for f in findings if f.level == level))
        for level in (CRITICAL, WARNING)
    }
    if not any(bad.values()):
        return "no findings"
    said = [f"{level}: {', '.join(checks)}" for level, checks in bad.items() if checks]
    return "; ".join(said)


def is_clean(findings: list[Finding]) -> bool:
    """Whether nothing but notes was found."""
    return all(finding.level == NOTE for finding in findings)
