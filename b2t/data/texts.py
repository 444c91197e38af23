"""Sentences that nobody recorded: a decoder that reads phonemes learns their spelling."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from b2t.data.phonemes import SIL, sentence_to_ids, words_of
from b2t.errors import UserError
from b2t.log import logger

log = logger(__name__)

SESSION = "texts"
OF_TRIALS = f"{SESSION}/0/"
"""What the names of the training trials' sentences begin with."""


class Sentence(NamedTuple):
    """A text and how it is said."""

    text: str
    phonemes: list[int]
    """Class ids 1–40."""
    name: str
    """``texts/file/line``; file 0 holds the training trials."""

    def words(self) -> list[tuple[str, list[int]]]:
        """Cut behind each silence: words as written and as said.

        All words but the first bring the space before them. Where as many are not said as are
        written, the whole is one.
        """
        written = self.text.split(" ")
        written = [written[0], *(f" {word}" for word in written[1:])]
        ends = [place + 1 for place, phoneme in enumerate(self.phonemes) if phoneme == SIL]
        if len(ends) != len(written) or ends[-1] != len(self.phonemes):
            return [(self.text, self.phonemes)]
        said = [self.phonemes[i:j] for i, j in zip([0, *ends], ends, strict=False)]
        return list(zip(written, said, strict=True))


def read_sentences(
    files: Sequence[str], train: Dataset, held_out: Iterable[Dataset]
) -> list[Sentence]:
    """Collect all sentences that spelling can be learnt from.

    They are those of the training trials that have phonemes, as they are, and the lines of text
    files, pronounced by the CMU dictionary. Left out, and counted in the log, are lines whose words
    are those of a sentence that is held out or occurred before, and lines with a word that the
    dictionary lacks.

    Args:
        files: paths of texts in UTF-8, one sentence per line; blank lines and those that begin with
            ``#`` are skipped.
        train: training trials.
        held_out: other splits, whose sentences must not be learnt.

    Raises:
        UserError: a file cannot be read, or there is no sentence.
    """
    found = [
        Sentence(" ".join(text.split()), ids, f"{OF_TRIALS}{place}")
        for place, (text, ids) in enumerate(_pairs(train))
        if text and ids
    ]
    known = {tuple(words_of(sentence.text)) for sentence in found}
    known |= {tuple(words_of(text)) for split in held_out for text, _ in _pairs(split) if text}
    for number, file in enumerate(files, 1):
        lines = read_lines(file)
        repeated = unspoken = 0
        for place, line in lines:
            words = tuple(words_of(line))
            if words in known:
                repeated += 1
                continue
            try:
                found.append(Sentence(line, sentence_to_ids(line), f"{SESSION}/{number}/{place}"))
            except UserError:  # no word, or one without a pronunciation
                unspoken += 1
                continue
            known.add(words)
        log.info(
            "%s: %s of %s lines are learnt from; %s are sentences of other splits or repeated, %s "
            "have no pronunciation",
            file, f"{len(lines) - repeated - unspoken:,}", f"{len(lines):,}", repeated, unspoken,
        )  # fmt: skip
    if not found:
        raise UserError(
            "text_from=texts: no training trial has text and phonemes, and data.texts brings no "
            "sentence that can be pronounced: name a text file with one sentence per line"
        )
    return found


def read_lines(file: str) -> list[tuple[int, str]]:
    """Lines of a text file that are neither blank nor comments, each with its number from 1.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        content = Path(file).expanduser().read_text("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"data.texts: {file} cannot be read ({error.strerror}); name text files with one "
            "sentence per line"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"data.texts: {file} is not UTF-8 text (byte {error.start})") from None
    lines = [(number, " ".join(line.split())) for number, line in enumerate(content.split("\n"), 1)]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def sentences_checksum(sentences: Iterable[Sentence]) -> str:
    """Digest of what is written and said, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for sentence in sentences:
        digest.update(repr(tuple(sentence)).encode())
    return digest.hexdigest()


def _pairs(dataset: Dataset) -> list[tuple[str | None, list[int] | None]]:
    table = dataset.with_format("arrow").select_columns(["text", "phonemes"])[:]
    return list(zip(table["text"].to_pylist(), table["phonemes"].to_pylist(), strict=True))
