"""Batches of sentences without signals."""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from b2t.data.augment import row_generator
from b2t.data.batches.batch import Batch, Example, collate
from b2t.data.batches.order import BatchPlan
from b2t.data.batches.rows import encode_texts
from b2t.data.texts import Sentence
from b2t.labels import UNSEEN_SESSION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SentenceRows(TorchDataset):
    """Sentences, or phrases of them, as `Example` with one bin of silence.

    Args:
        sentences: what is learnt.
        tokenizer: any transformers tokenizer with an end token.
        channels: C of the model.
        phrase_words: longest phrase; each epoch takes another phrase of 1 to so many words of a
            sentence. None takes sentences whole.
    """

    def __init__(
        self,
        sentences: Sequence[Sentence],
        tokenizer: "PreTrainedTokenizerBase",
        channels: int,
        *,
        seed: int,
        phase: int,
        phrase_words: int | None = None,
    ) -> None:
        self.sentences = sentences
        self.tokenizer = tokenizer
        self.seed = seed
        self.phase = phase
        self.phrase_words = phrase_words
        self._signal = np.zeros((1, channels), np.float32)

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        """Return the row ``key`` = (epoch, index)."""
        epoch, index = key
        sentence = self.sentences[int(index)]
        text, phonemes = sentence.text, sentence.phonemes
        if self.phrase_words is not None:
            text, phonemes = self._phrase(sentence, epoch)
        return Example(
            signal=self._signal,
            target=self._signal,
            mask=np.ones(1, bool),
            session=UNSEEN_SESSION,
            labels=encode_texts([text], self.tokenizer)[0],
            phonemes=np.asarray(phonemes, np.int64),
            row=sentence.name,
            text=text,
        )

    def _phrase(self, sentence: Sentence, epoch: int) -> tuple[str, list[int]]:
        """Words of the sentence that follow each other, a function of seed, phase and epoch."""
        assert self.phrase_words is not None
        generator = row_generator(self.seed, self.phase, epoch, sentence.name)
        words = sentence.words()
        count = min(int(generator.integers(1, self.phrase_words + 1)), len(words))
        first = int(generator.integers(0, len(words) - count + 1))
        chosen = words[first : first + count]
        return "".join(text for text, _ in chosen), [p for _, said in chosen for p in said]


def sentence_batches(
    rows: SentenceRows,
    *,
    consumed: int,
    micro_batch: int,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
) -> Generator[list[Batch], None, None]:
    """Yield this rank's micro-batches of each step, without end; read in this process.

    Args:
        rows: the sentences.
        consumed: global batches of the phase that are past.

    Raises:
        UserError: fewer sentences than a global batch.
    """
    seed, phase = rows.seed, rows.phase
    lengths = [len(sentence.phonemes) for sentence in rows.sentences]
    plan = BatchPlan(lengths, micro_batch * accumulation * world, split="texts")
    epoch, position = plan.place(seed, phase, consumed)
    share = {
        "micro_batch": micro_batch, "accumulation": accumulation, "rank": rank, "world": world,
    }  # fmt: skip
    while True:
        parts = plan.micro_batches(seed, phase, epoch, position, **share)
        yield [collate([rows[(epoch, int(index))] for index in part]) for part in parts]
        epoch, position = plan.following(seed, phase, epoch, position)
