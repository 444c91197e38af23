"""Words by joint scores: CTC and n-grams propose, text decoder and causal model judge as well.

A first pass proposes the best hypotheses of each trial, the text decoder's own beam adds some. All
are scored by everything that knows something of them, and a weighted sum chooses: the shallow
fusion of attention and CTC of Hori et al., Joint CTC/attention decoding (2017), on n-best lists.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from b2t.errors import UserError
from b2t.evaluate import metrics
from b2t.evaluate.decode import to_model
from b2t.evaluate.likelihood import (
    CausalScorer,
    ctc_log_likelihood,
    text_decoder_log_likelihood,
)
from b2t.evaluate.surface import SurfaceForms
from b2t.evaluate.words import Hypothesis, WordDecoder, emissions
from b2t.model.tokenizer import decode_texts

if TYPE_CHECKING:
    from b2t.data.batches import Batch
    from b2t.model.brain_to_text import BrainToText

_GRID: dict[str, tuple[float, ...]] = {
    "lm_weight": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0),
    "word_score": (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0),
    "decoder_weight": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0),
    "causal_weight": (0.0, 0.25, 0.5, 1.0, 2.0),
}


class Rescoring(BaseModel):
    """Weights of a joint score beside the natural logarithm of CTC, which counts once.

    Attributes:
        n_best: hypotheses of the first pass.
        own: hypotheses that the text decoder adds by a beam of this width; 0 adds none.
        lm_weight: of the n-gram model's log10 probability.
        word_score: added per word.
        decoder_weight: of the text decoder's log-probability; 0 leaves it out.
        causal_weight: of the causal model's log-probability.
        causal: folder or Hub id of the causal model, None for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_best: int = Field(default=50, ge=1)
    own: int = Field(default=4, ge=0)
    lm_weight: float = Field(default=2.0, ge=0, le=100)
    word_score: float = Field(default=0.0, ge=-100, le=100)
    decoder_weight: float = Field(default=0.0, ge=0, le=100)
    causal_weight: float = Field(default=0.0, ge=0, le=100)
    causal: str | None = None


class Candidate(NamedTuple):
    """A hypothesis and all that is known of it; a part that was not asked is 0."""

    text: str
    ctc: float
    """Natural logarithm, summed over the alignments of its phonemes."""
    lm: float
    """log10 probability under the n-grams."""
    decoder: float
    """Natural logarithm under the text decoder, summed over the ways to end the sentence."""
    causal: float
    """Natural logarithm under the causal model, likewise."""

    def score(self, weights: Rescoring) -> float:
        """Return the joint score."""
        return (
            self.ctc
            + weights.lm_weight * self.lm
            + weights.word_score * len(self.text.split())
            + _times(weights.decoder_weight, self.decoder)
            + _times(weights.causal_weight, self.causal)
        )


class Readings(NamedTuple):
    """What was read of a batch."""

    first: list[str]
    """B texts of the first pass."""
    joint: list[str] | None
    """B texts by joint scores; None without weights for them."""


@dataclass
class WordReader:
    """Reads words of what a model makes of signals.

    Attributes:
        decoder: the first pass.
        rescoring: weights of the joint score; None leaves it out.
        model: a `BrainToText` in evaluation mode, whose text decoder judges too; None for none.
        surface: how hypotheses are written for the models.
        causal: the causal model, None for none.
    """

    decoder: WordDecoder
    rescoring: Rescoring | None = None
    model: "BrainToText | None" = None
    surface: SurfaceForms = SurfaceForms()  # noqa: RUF009  # frozen
    causal: CausalScorer | None = None

    def read(self, output: Any) -> Readings:
        """Read B signals.

        Args:
            output: of `BrainToText.forward`, with phoneme logits.
        """
        rows = emissions(output.phoneme_logits, output.frame_mask, self._penalty)
        found = [self.decoder.n_best(row, self._number) for row in rows]
        first = [hypotheses[0].text for hypotheses in found]
        if self.rescoring is None:
            return Readings(first, None)
        weights = self.rescoring
        candidates = self._judge(output, rows, found)
        best = [max(some, key=lambda candidate: candidate.score(weights)) for some in candidates]
        return Readings(first, [candidate.text for candidate in best])

    def candidates(self, output: Any) -> list[list[Candidate]]:
        """Return all that is known of the hypotheses of B signals, the first pass's best first."""
        rows = emissions(output.phoneme_logits, output.frame_mask, self._penalty)
        return self._judge(output, rows, [self.decoder.n_best(row, self._number) for row in rows])

    def ranked(self, output: Any, number: int) -> list[list[dict[str, Any]]]:
        """Return at most ``number`` hypotheses of B signals with their scores, best first.

        Without weights of joint scores these are the first pass's, with its scores.
        """
        if self.rescoring is not None:
            weights = self.rescoring
            joint = [
                sorted(some, key=lambda candidate: -candidate.score(weights))[:number]
                for some in self.candidates(output)
            ]
            return [[{**c._asdict(), "score": c.score(weights)} for c in some] for some in joint]
        rows = emissions(output.phoneme_logits, output.frame_mask, self._penalty)
        found = [self.decoder.n_best(row, number) for row in rows]
        return [
            [{"text": h.text, "score": h.score, "ctc": h.ctc, "lm": h.lm} for h in some]
            for some in found
        ]

    @property
    def _penalty(self) -> float:
        return self.decoder.options.blank_penalty

    @property
    def _number(self) -> int:
        return 1 if self.rescoring is None else self.rescoring.n_best

    def _judge(
        self, output: Any, rows: Sequence[Tensor], found: Sequence[Sequence[Hypothesis]]
    ) -> list[list[Candidate]]:
        spoken = [self._spoken(h) for h in found]
        for row, texts in enumerate(self._own(output)):
            for text in texts:
                ways = self.decoder.pronounce(text.split())
                if ways and text not in spoken[row]:
                    spoken[row][text] = (ways, self.decoder.lm_score(text.split()))
        places = [(row, text) for row, some in enumerate(spoken) for text in some]
        decoder = self._written(places, output) if self._asks_decoder else {}
        causal = self._written(places, None) if self.causal is not None else {}
        result: list[list[Candidate]] = []
        for row, (frames, some) in enumerate(zip(rows, spoken, strict=True)):
            ctc = _best_ways(frames, [ways for ways, _ in some.values()])
            result.append(
                [
                    Candidate(
                        text, score, lm, decoder.get((row, text), 0.0), causal.get((row, text), 0.0)
                    )
                    for score, (text, (_, lm)) in zip(ctc, some.items(), strict=True)
                ]
            )
        return result

    @property
    def _asks_decoder(self) -> bool:
        return self.model is not None

    def _spoken(
        self, hypotheses: Sequence[Hypothesis]
    ) -> dict[str, tuple[list[tuple[int, ...]], float]]:
        """Phonemes and n-gram score of hypotheses of the first pass, by text."""
        return {h.text: ([h.labels], self.decoder.lm_score(h.text.split())) for h in hypotheses}

    @torch.no_grad()
    def _own(self, output: Any) -> list[list[str]]:
        """Plain texts of the text decoder's own beam, per row."""
        number = self.rescoring.own if self.rescoring is not None else 0
        if self.model is None or not number:
            return []
        memory = self.model.text_memory(output)
        tokens = self.model.text_decoder.generate(
            *memory, num_beams=number, num_return_sequences=number, do_sample=False
        )
        texts = [metrics.normalise_text(t) for t in decode_texts(self.model.tokenizer, tokens)]
        return [texts[i : i + number] for i in range(0, len(texts), number)]

    def _written(
        self, places: Sequence[tuple[int, str]], output: Any | None
    ) -> dict[tuple[int, str], float]:
        """Log-probabilities of the texts as they are written, by the text decoder of `output`."""
        ways = [self.surface.render(text.split()) for _, text in places]
        texts = list(itertools.chain.from_iterable(ways))
        if output is None:
            assert self.causal is not None
            scores = self.causal(texts)
        else:
            assert self.model is not None
            rows = [row for (row, _), some in zip(places, ways, strict=True) for _ in some]
            scores = text_decoder_log_likelihood(self.model, output, rows, texts)
        each = iter(scores)
        return {
            place: float(np.logaddexp.reduce([next(each) for _ in some]))
            for place, some in zip(places, ways, strict=True)
        }


@torch.no_grad()
def collect(
    reader: WordReader, model: "BrainToText", batches: Iterable["Batch"]
) -> tuple[list[list[Candidate]], list[str]]:
    """Candidates of every row with text, and the texts."""
    trials, targets = [], []
    for batch in batches:
        output = model(to_model(batch, model), weights={"phoneme": 1.0})
        for some, text in zip(reader.candidates(output), batch.texts, strict=True):
            if text:
                trials.append(some)
                targets.append(text)
    return trials, targets


def tune_rescoring(
    trials: Sequence[Sequence[Candidate]], targets: Sequence[str], start: Rescoring
) -> tuple[Rescoring, float, float, int]:
    """Choose the weights of a joint score by WER, over a grid of all of them at once.

    Of equal WER, the weights win under whose softmax fewer errors are expected: they are farther
    from the next mistake.

    Args:
        trials: candidates of each trial, all scored.
        targets: what was meant.
        start: weights before; parts that no candidate has keep the weight 0.

    Returns:
        The weights, their WER, that of the weights before, and the number of settings tried.
    """
    known, edits = _table(trials, targets)
    length = max(sum(len(metrics.normalise_text(target).split()) for target in targets), 1)

    def cost(weights: Rescoring) -> tuple[float, float]:
        scores = known["ctc"] + weights.word_score * known["words"]
        for name, weight in (
            ("lm", weights.lm_weight),
            ("decoder", weights.decoder_weight),
            ("causal", weights.causal_weight),
        ):
            scores = scores + (weight * known[name] if weight else 0.0)
        top = scores.max(1, keepdims=True)
        share = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
        expected = (share * edits).sum(1) / np.maximum(share.sum(1), 1e-300)
        chosen = np.take_along_axis(edits, scores.argmax(1)[:, None], 1)
        return float(chosen.sum()) / length, float(expected.sum()) / length

    asked = {"decoder_weight": "decoder", "causal_weight": "causal"}
    grid = {
        name: values
        for name, values in _GRID.items()
        if name not in asked or known[asked[name]].any()
    }
    tried = [
        start.model_copy(update=dict(zip(grid, values, strict=True)))
        for values in itertools.product(*grid.values())
    ]
    best = min([start, *tried], key=cost)
    return best, cost(best)[0], cost(start)[0], len(tried)


def require_text_decoder(model: "BrainToText", weights: Rescoring, where: str) -> Any | None:
    """Return the model where its text decoder judges, None where none does.

    Raises:
        UserError: weights that want a text decoder, and a model that has none.
    """
    if weights.decoder_weight == 0:
        return None
    if model.text_decoder is None:
        raise UserError(
            f"{where}: its joint scores were tuned with a text decoder, which this model has not: "
            "tune them anew (`b2t lm --tune`), or leave them out with --no-rescoring"
        )
    return model


def _table(
    trials: Sequence[Sequence[Candidate]], targets: Sequence[str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What is known of R trials' candidates, and their word errors, each [R, H]."""
    shape = (len(trials), max(map(len, trials)))
    known = {name: np.zeros(shape) for name in ("lm", "words", "decoder", "causal")}
    known["ctc"] = np.full(shape, -np.inf)
    edits = np.zeros(shape, np.int64)
    for row, (some, target) in enumerate(zip(trials, targets, strict=True)):
        plain, number = metrics.normalise_text(target), len(some)
        texts = [candidate.text for candidate in some]
        edits[row, :number] = metrics.count_edits([plain] * number, texts, "word").edits
        known["words"][row, :number] = [len(text.split()) for text in texts]
        for name in ("ctc", "lm", "decoder", "causal"):
            known[name][row, :number] = [getattr(candidate, name) for candidate in some]
    return known, edits


def _times(weight: float, value: float) -> float:
    """Product in which a part of no weight counts nothing, impossible or not."""
    return weight * value if weight else 0.0


def _best_ways(frames: Tensor, ways: Iterable[Sequence[Sequence[int]]]) -> list[float]:
    """CTC log-probability of the best pronunciation of each sentence."""
    listed = [list(some) for some in ways]
    each = iter(ctc_log_likelihood(frames, [labels for some in listed for labels in some]))
    return [max(next(each) for _ in some) for some in listed]
