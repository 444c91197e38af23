"""Labels: names that stand twice, too many for their frames, or texts that no token writes."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from datasets import Dataset

from b2t.data.trials import row_ids, signal_lengths
from b2t.evaluate.audit.findings import CRITICAL, NOTE, WARNING, Finding
from b2t.evaluate.metrics import normalise_text
from b2t.model.patches import num_patches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FRAMES, TEXTS, NAMES = "CTC frames", "texts", "trial names"
_MANY = 0.05
"""Share of trials without enough frames above which training is of another data set."""
_EXAMPLES = 5
_SHARES = (1.0, 0.99, 0.9)


class Patches(NamedTuple):
    """How a model cuts time: bins of a patch, and bins from one to the next."""

    size: int
    stride: int


def check_names(splits: Mapping[str, Dataset]) -> Finding:
    """Find trials that share a name (session/block/trial) with another of their split."""
    places = [
        {"split": split, "trial": name, "count": count}
        for split, dataset in splits.items()
        for name, count in Counter(row_ids(dataset)).items()
        if count > 1
    ]
    if not places:
        return Finding(NAMES, NOTE, "no two trials of a split share a name", {"places": []})
    return Finding(
        NAMES,
        CRITICAL,
        f"{len(places):,} names (session/block/trial) stand for several trials of a split",
        {"places": places},
        [f"{p['trial']} ({p['split']}): {p['count']} trials" for p in places[:_EXAMPLES]],
        "were files copied? Remove or renumber them: training and scores tell trials by name",
    )


def frames_needed(phonemes: Sequence[int]) -> int:
    """Return the frames of the shortest CTC path: one for each label, one between two equal."""
    return len(phonemes) + sum(a == b for a, b in itertools.pairwise(phonemes))


def largest_patch(bins: int, needed: int) -> int:
    """Return the largest patch (size = stride) of which a trial has enough; 0 where none does."""
    if needed <= 1:
        return bins
    return (bins - 1) // (needed - 1)


def check_frames(splits: Mapping[str, Dataset], patches: Patches | None) -> Finding:
    """Compare every trial's phonemes with its frames.

    Args:
        splits: rows by split.
        patches: of the model; None asks whether one bin per frame would do.
    """
    size, stride = patches or (1, 1)
    places: list[dict[str, Any]] = []
    largest: list[int] = []
    for split, dataset in splits.items():
        names, bins = row_ids(dataset), signal_lengths(dataset).tolist()
        columns = dataset.select_columns(["phonemes", "session"]).with_format("arrow")[:]
        labels, sessions = columns["phonemes"].to_pylist(), columns["session"].to_pylist()
        for row, phonemes in enumerate(labels):
            if not phonemes:
                continue
            needed = frames_needed(phonemes)
            largest.append(largest_patch(bins[row], needed))
            frames = num_patches(bins[row], size, stride)
            if frames < needed:
                place = {"split": split, "trial": names[row], "session": sessions[row]}
                places.append({**place, "frames": frames, "needed": needed, "fits": largest[-1]})
    if not largest:
        return Finding(FRAMES, NOTE, "no phonemes: nothing to compare")
    fitting = {share: int(np.quantile(largest, 1 - share, method="lower")) for share in _SHARES}
    fit = ", ".join(f"{100 * share:g} % of trials fit up to {n}" for share, n in fitting.items())
    numbers = {
        "places": places,
        "trials": len(largest),
        "patches": {str(k): v for k, v in fitting.items()},
    }
    cut = f"patches of {size} bins every {stride}" if patches else "one frame per bin"
    if not places:
        text = f"all {len(largest):,} labels fit into {cut}; of patches in bins, {fit}"
        return Finding(FRAMES, NOTE, text, numbers)
    level = CRITICAL if len(places) > _MANY * len(largest) else WARNING
    return Finding(
        FRAMES,
        level,
        f"{len(places):,} of {len(largest):,} trials have fewer frames ({cut}) than CTC needs for "
        "their phonemes, and train nothing",
        numbers,
        [
            f"{p['trial']} ({p['split']}): {p['frames']} frames, {p['needed']} needed"
            for p in places[:_EXAMPLES]
        ],
        f"shorten model.encoder.patch_stride: {fit} bins"
        if fitting[1.0]
        else f"these trials are cut off or carry another trial's label; of patches in bins, {fit}",
    )


def check_texts(
    splits: Mapping[str, Dataset],
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int | None = None,
) -> Finding:
    """Write every text in tokens and read it again.

    Args:
        splits: rows by split.
        tokenizer: of the text decoder.
        max_tokens: longest text, end token included; None for any length.
    """
    places: list[dict[str, Any]] = []
    count = 0
    for split, dataset in splits.items():
        names = row_ids(dataset)
        columns = dataset.select_columns(["text", "session"]).with_format("arrow")[:]
        sessions, texts = columns["session"].to_pylist(), columns["text"].to_pylist()
        problems: dict[str, str] = {}
        for row, text in enumerate(texts):
            if text is None:
                continue
            count += 1
            if text not in problems:
                problems[text] = text_problem(text, tokenizer, max_tokens)
            if problems[text]:
                place = {"split": split, "trial": names[row], "session": sessions[row]}
                places.append({**place, "said": problems[text], "text": text})
    if not count:
        return Finding(TEXTS, NOTE, "no texts: nothing to write")
    if not places:
        text = f"all {count:,} texts can be written by the tokenizer and scored"
        return Finding(TEXTS, NOTE, text, {"places": []})
    return Finding(
        TEXTS,
        WARNING,
        f"{len(places):,} of {count:,} texts cannot be written as they are, or not be scored",
        {"places": places},
        [f"{p['trial']} ({p['split']}), “{p['text']}”: {p['said']}" for p in places[:_EXAMPLES]],
        "repair the texts' encoding where they come from, or choose another tokenizer "
        "(model.text_decoder.tokenizer=byte writes every text)",
    )


def text_problem(text: str, tokenizer: "PreTrainedTokenizerBase", max_tokens: int | None) -> str:
    """Say what is wrong with a text; empty where nothing is."""
    if "\ufffd" in text:
        return "holds U+FFFD, which stands for a letter that was lost in decoding"
    plain = normalise_text(text)
    if not plain:
        return "holds nothing that is scored"
    ids = tokenizer(text)["input_ids"]
    if max_tokens is not None and len(ids) > max_tokens:
        return f"takes {len(ids)} tokens, and data.max_text_tokens is {max_tokens}"
    written = tokenizer.decode(ids, skip_special_tokens=True)
    if normalise_text(written) != plain:
        return f"comes back from its tokens as “{written}”"
    return ""
