"""Words from phoneme logits: CTC beam search over a lexicon with an n-gram language model.

The search is flashlight-text's, the language model is read by KenLM within it: the decoder that
the field uses behind phoneme models (Willett et al. 2023, Card et al. 2024 search with Kaldi's
counterpart). b2t estimates the model and the lexicon: see `b2t.evaluate.language_model`.
"""

import contextlib
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from b2t.data.phonemes import BLANK, PHONEMES, SIL, pronunciations, to_ids
from b2t.errors import UserError
from b2t.evaluate.lexicon import Lexicon, Spelling
from b2t.evaluate.ngram import UNKNOWN

_KENLM_FAULTS = (RuntimeError, OSError, ValueError, IndexError)

_VARIANTS = 16
"""Pronunciations of one sentence that are tried at most."""


class SearchOptions(BaseModel):
    """Weights and widths of the search.

    Attributes:
        lm_weight: of the language model's log10 probability beside the natural logarithm of CTC.
        word_score: added per word; above 0 it favours more words.
        blank_penalty: subtracted from the logit of the blank before the softmax.
        beam_size: hypotheses kept after a frame.
        beam_size_token: classes looked at in a frame, the most probable ones.
        beam_threshold: hypotheses this far below the best are dropped.
        log_add: sum over the alignments of a hypothesis instead of taking the best.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lm_weight: float = Field(default=2.0, ge=0, le=100)
    word_score: float = Field(default=0.0, ge=-100, le=100)
    blank_penalty: float = Field(default=0.0, ge=-20, le=20)
    beam_size: int = Field(default=100, ge=1, le=100_000)
    beam_size_token: int = Field(default=len(PHONEMES), ge=1, le=len(PHONEMES))
    beam_threshold: float = Field(default=60.0, gt=0)
    log_add: bool = True


@dataclass(frozen=True)
class Hypothesis:
    """One reading of a trial.

    Attributes:
        text: words with single spaces.
        score: total, by which hypotheses are ordered.
        ctc: logarithm of the best alignment's probability.
        lm: log10 probability of the words under the language model, without its weight.
        labels: phonemes and silences that were read, class ids.
    """

    text: str
    score: float
    ctc: float
    lm: float
    labels: tuple[int, ...] = ()


def emissions(logits: Tensor, mask: Tensor, blank_penalty: float = 0.0) -> list[Tensor]:
    """Log-probabilities of the real frames of each row.

    Args:
        logits: [B, P, classes].
        mask: [B, P] bool, True = real.
        blank_penalty: subtracted from the logit of class 0.

    Returns:
        B float32 tensors [frames, classes] on the CPU.

    Raises:
        ValueError: a real frame is not finite.
    """
    logits = logits.detach().float().cpu()
    if blank_penalty:
        penalty = torch.zeros(logits.shape[-1])
        penalty[BLANK] = blank_penalty
        logits = logits - penalty
    rows = [row[keep] for row, keep in zip(logits, mask.cpu(), strict=True)]
    if not all(bool(torch.isfinite(row).all()) for row in rows):
        raise ValueError("the phoneme logits are not finite: the model has diverged")
    return [row.log_softmax(-1).contiguous() for row in rows]


def library() -> Any:
    """Return flashlight-text's decoder module.

    Raises:
        UserError: it is not installed.
    """
    try:
        from flashlight.lib.text import decoder
    except ImportError:
        raise UserError(
            "decoding with a lexicon needs flashlight-text, or from Python 3.13 on "
            "ufal-flashlight-text, which is the same: pip install 'b2t[lm]' (this is Python "
            f"{sys.version_info[0]}.{sys.version_info[1]})"
        ) from None
    return decoder


class WordDecoder:
    """Beam search over a lexicon with an n-gram model.

    A word may be followed by silence or by the next word at once: labels have a silence after
    every word, but a model may miss it. Where it is missed, the last phone of the word counts for
    one frame only. flashlight-text keeps at most six words of one pronunciation.

    Readings that score alike are ordered by their letters: left to itself the search orders them
    by where they lie in memory, another way at each call. Where the language model has no weight,
    words of one pronunciation always score alike, and the best reading has the first of them; the
    others are looked for where several readings are asked for.

    Args:
        arpa: language model, ARPA or KenLM's binary format.
        lexicon: words and pronunciations.
        options: weights and widths.

    Raises:
        UserError: the file cannot be read, or flashlight-text is not installed.
    """

    def __init__(self, arpa: Path, lexicon: Lexicon, options: SearchOptions) -> None:
        self._library = library()
        self._lexicon = lexicon
        self._words, self._model = _read_model(arpa, lexicon)
        self._tries: dict[bool, Any] = {}
        self.with_options(options)

    def with_options(self, options: SearchOptions) -> "WordDecoder":
        """Take other weights and widths; the model and the lexicon stay loaded."""
        self.options = options
        self.search = self._search(alternatives=options.lm_weight > 0)
        self._wide: Any = self.search if options.lm_weight > 0 else None
        return self

    def _search(self, alternatives: bool) -> Any:
        """The library's search; without ``alternatives`` through one word per pronunciation."""
        if alternatives not in self._tries:
            entries = _entries(self._lexicon, alternatives)
            self._tries[alternatives] = _trie(self._library, self._words, self._model, entries)
        options = self.options
        return self._library.LexiconDecoder(
            self._library.LexiconDecoderOptions(
                options.beam_size,
                options.beam_size_token,
                options.beam_threshold,
                options.lm_weight,
                options.word_score,
                -math.inf,
                0.0,
                options.log_add,
                self._library.CriterionType.CTC,
            ),
            self._tries[alternatives],
            self._model,
            SIL,
            BLANK,
            self._words.get_index(UNKNOWN),
            [],
            False,
        )

    def n_best(self, frames: Tensor, number: int) -> list[Hypothesis]:
        """Read one trial.

        Args:
            frames: [P, 41] float32 log-probabilities on the CPU, from `emissions`.
            number: of hypotheses at most.

        Returns:
            Different texts, the best first; one empty text for a trial without frames.
        """
        if not len(frames):
            return [Hypothesis("", 0.0, 0.0, 0.0)]
        if number > 1 and self._wide is None:
            self._wide = self._search(alternatives=True)
        search = self.search if number == 1 else self._wide
        best: dict[str, Hypothesis] = {}
        for found in self.ordered(search.decode(frames.data_ptr(), *frames.shape)):
            text = self.text(found)
            if text not in best:
                best[text] = Hypothesis(
                    text,
                    found.score,
                    found.emittingModelScore,
                    found.lmScore,
                    _merged(found.tokens),
                )
                if len(best) == number:
                    break
        return list(best.values()) or [Hypothesis("", -math.inf, -math.inf, -math.inf)]

    def ordered(self, found: Sequence[Any]) -> list[Any]:
        """Results of the search, the best first, those that score alike by their letters."""
        # Sums over alignments come in any order: their last digits mean nothing.
        return sorted(found, key=lambda each: (-round(each.score, 6), self.text(each)))

    def text(self, found: Any) -> str:
        """Words of a result of the search, with single spaces."""
        return " ".join(self._words.get_entry(word) for word in found.words if word >= 0)

    def decode(self, logits: Tensor, mask: Tensor) -> list[str]:
        """Read a batch: logits [B, P, 41] and mask [B, P] → B texts."""
        rows = emissions(logits, mask, self.options.blank_penalty)
        return [self.n_best(row, 1)[0].text for row in rows]

    def lm_score(self, words: Sequence[str]) -> float:
        """Return log10 of a sentence's probability under the language model, its end included."""
        state, total = self._model.start(False), 0.0
        unknown = self._words.get_index(UNKNOWN)
        for word in words:
            index = self._words.get_index(word) if self._words.contains(word) else unknown
            state, score = self._model.score(state, index)
            total += score
        return total + self._model.finish(state)[1]

    def pronounce(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """Class ids of a sentence, a silence after every word, in up to 16 pronunciations.

        Words outside the lexicon are looked up in the CMU dictionary; the list is empty where one
        stands in neither.
        """
        each = [
            self._lexicon.spellings.get(word) or [tuple(to_ids(p)) for p in pronunciations(word)]
            for word in words
        ]
        variants = itertools.islice(itertools.product(*each), _VARIANTS)
        return [
            tuple(label for spelling in variant for label in (*spelling, SIL))
            for variant in variants
        ]


class PhonemeBeam:
    """CTC prefix beam search without lexicon and language model, by flashlight-text.

    It sums over the alignments of a prefix (Graves 2006, prefix search decoding), which greedy
    decoding does not.

    Args:
        beam_size: prefixes kept after a frame.
        classes: number of classes K, blank included.
    """

    def __init__(self, beam_size: int, classes: int = len(PHONEMES)) -> None:
        library_ = library()
        options = library_.LexiconFreeDecoderOptions(
            beam_size, classes, 100.0, 0.0, 0.0, True, library_.CriterionType.CTC
        )
        # The silence is a class like others here; no class may begin or end more freely.
        self._search = library_.LexiconFreeDecoder(options, library_.ZeroLM(), SIL, BLANK, [])

    def decode(self, logits: Tensor, mask: Tensor) -> list[list[int]]:
        """Read a batch: logits [B, P, K] and mask [B, P] → B lists of class ids."""
        return [self._one(row) for row in emissions(logits, mask)]

    def _one(self, frames: Tensor) -> list[int]:
        if not len(frames):
            return []
        return list(_merged(self._search.decode(frames.data_ptr(), *frames.shape)[0].tokens))


def _merged(alignment: Sequence[int]) -> tuple[int, ...]:
    """Labels of an alignment, which the search frames by one token at each end."""
    return tuple(c for c, _ in itertools.groupby(alignment[1:-1]) if c != BLANK)


def _read_model(arpa: Path, lexicon: Lexicon) -> tuple[Any, Any]:
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    if not arpa.is_file():
        raise UserError(f"{arpa}: no language model there; `b2t lm` makes one")
    words = Dictionary()
    for word in [*sorted(lexicon.spellings), UNKNOWN]:
        words.add_entry(word)
    try:
        with _silent():
            return words, KenLM(str(arpa), words)
    except _KENLM_FAULTS as error:
        reason = " ".join(str(error).split())[-300:]
        raise UserError(
            f"{arpa}: not a sound ARPA or KenLM file ({reason}); make it anew with `b2t lm`"
        ) from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep KenLM's progress bar, which C++ writes, from the terminal."""
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def _entries(lexicon: Lexicon, alternatives: bool) -> list[tuple[str, Spelling]]:
    """Words with each of their pronunciations; without ``alternatives`` the first word of each."""
    every = [(word, each) for word, found in sorted(lexicon.spellings.items()) for each in found]
    if alternatives:
        return every
    first = {spelling: word for word, spelling in reversed(every)}
    return [(word, spelling) for word, spelling in every if first[spelling] == word]


def _trie(library_: Any, words: Any, model: Any, entries: Sequence[tuple[str, Spelling]]) -> Any:
    trie = library_.Trie(len(PHONEMES), SIL)
    start = model.start(False)
    for word, spelling in entries:
        index = words.get_index(word)
        score = model.score(start, index)[1]
        # Without the second, the last phone of a word could not last two frames.
        trie.insert(list(spelling), index, score)
        trie.insert([*spelling, SIL], index, score)
    trie.smear(library_.SmearingMode.MAX)
    return trie
