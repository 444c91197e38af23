"""Where the sentences of simulated recordings come from: a grammar, or a list written by people.

A list is a text file with one sentence per line; blank lines and lines that start with ``#`` are
skipped, and lines that repeat the words of an earlier one are dropped. Sentences of a list follow
no table, so that a decoder has nothing to learn but English.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import numpy as np

from b2t.data.grammar import GRAMMARS, load_grammar
from b2t.data.phonemes import pronounce, words_of
from b2t.errors import UserError

VOCABULARIES: tuple[int | str, ...] = (*GRAMMARS, "everyday")
"""Built-in sources: grammars by their (nominal) number of words, and a list of real sentences."""

LABEL_LENGTH = 500
"""Length to which the release pads class ids and character codes (which end with a zero)."""


class SentenceSource(Protocol):
    """What the simulation asks of a grammar or a list."""

    def vocabulary(self) -> list[str]:
        """All words, lower-case and sorted."""

    def draw(self, rng: np.random.Generator) -> str:
        """Draw one sentence, whatever was drawn before."""

    def draw_different(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw ``count`` sentences, no two with the same words.

        Raises:
            UserError: there are not that many.
        """

    def origin(self) -> dict[str, str | int]:
        """What ``simulation.json`` says of the source beside its name; empty for a grammar."""


@dataclass(frozen=True)
class SentenceList:
    """Different sentences read from a text file.

    Attributes:
        name: name of the file.
        sha256: checksum of the file.
        texts: the sentences, no two with the same words.
        repeated: lines dropped because an earlier one has the same words.
    """

    name: str
    sha256: str
    texts: tuple[str, ...]
    repeated: int

    @classmethod
    def parse(cls, content: bytes, path: Path | str) -> "SentenceList":
        """Read a list from the content of its file; ``path`` serves the messages.

        Raises:
            UserError: the file is not UTF-8 text or holds no sentence, or a line holds no word, a
                word without a pronunciation, or what the release's layout has no room for.
        """
        lines = _lines(content, path)
        _check_words(lines, path)
        texts: dict[tuple[str, ...], str] = {}
        for number, text in lines:
            _check_fits(text, f"{path}: line {number}")
            texts.setdefault(tuple(words_of(text)), text)
        digest = hashlib.sha256(content).hexdigest()
        return cls(Path(path).name, digest, tuple(texts.values()), len(lines) - len(texts))

    def vocabulary(self) -> list[str]:
        """All words of the list, lower-case and sorted."""
        return sorted({word for text in self.texts for word in words_of(text)})

    def draw(self, rng: np.random.Generator) -> str:
        """Draw one sentence, whatever was drawn before."""
        return self.texts[int(rng.integers(len(self.texts)))]

    def draw_different(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw ``count`` sentences without repetition.

        Raises:
            UserError: the list is shorter.
        """
        if count > len(self.texts):
            raise UserError(
                f"asked for {count} different sentences, {self.name} holds {len(self.texts)}: "
                "ask for fewer trials or bring more --sentences"
            )
        return [self.texts[index] for index in rng.permutation(len(self.texts))[:count]]

    def origin(self) -> dict[str, str | int]:
        """File, checksum and sizes, as ``simulation.json`` records them."""
        return {
            "file": self.name,
            "sha256": self.sha256,
            "sentences": len(self.texts),
            "repeated": self.repeated,
            "words": len(self.vocabulary()),
        }


def load_source(vocabulary: int | str | Path) -> SentenceSource:
    """The source of a vocabulary of `VOCABULARIES`, or the list in the file of a path.

    Raises:
        UserError: there is no such vocabulary or file, or the file is no list (see
            `SentenceList.parse`).
    """
    if isinstance(vocabulary, Path):
        return SentenceList.parse(_content(vocabulary), vocabulary)
    if vocabulary not in VOCABULARIES:
        raise UserError(
            f"unknown vocabulary {vocabulary}: expected one of {', '.join(map(str, VOCABULARIES))}"
        )
    if isinstance(vocabulary, int):
        return load_grammar(vocabulary)
    name = f"{vocabulary}.txt"
    return SentenceList.parse(files("b2t.data").joinpath("sentences", name).read_bytes(), name)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read sentences from {path}: {error.strerror}; name a text file with one "
            "sentence per line"
        ) from None


def _lines(content: bytes, path: Path | str) -> list[tuple[int, str]]:
    """Sentences with their line numbers, which count from 1."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}): expected one sentence per line"
        ) from None
    # The release writes ASCII, and typographic apostrophes are common in text from elsewhere.
    text = text.replace("’", "'").replace("‘", "'")
    numbered = [(number, " ".join(line.split())) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"{path} holds no sentence: expected one per line")
    return lines


def _check_words(lines: list[tuple[int, str]], path: Path | str) -> None:
    missing: dict[str, int] = {}
    for number, text in lines:
        for word in words_of(text):
            try:
                pronounce(word)
            except KeyError:
                missing.setdefault(word, number)
    if missing:
        word, number = next(iter(missing.items()))
        more = len(missing) - 1
        others = f", nor of {more} other word{'s' * (more > 1)} of the file" if more else ""
        raise UserError(
            f"{path}: line {number}: no pronunciation of {word!r} in the CMU dictionary{others}; "
            "respell or remove"
        )


def _check_fits(text: str, where: str) -> None:
    words = words_of(text)
    if not words:
        raise UserError(f"{where}: no word in {text!r}; expected one sentence per line")
    foreign = next((character for character in text if not character.isascii()), None)
    if foreign is not None:
        raise UserError(f"{where}: {foreign!r} is not ASCII, which the release writes; replace it")
    phones = sum(len(pronounce(word)) + 1 for word in words)
    if len(text) >= LABEL_LENGTH or phones > LABEL_LENGTH:
        raise UserError(
            f"{where}: {len(text)} characters and {phones} phonemes, the release has room for "
            f"{LABEL_LENGTH - 1} and {LABEL_LENGTH}; shorten the sentence"
        )
