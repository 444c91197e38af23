"""How words are pronounced: learnt from a dataset's own labels, else from the CMU dictionary."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from b2t.data.phonemes import SIL, pronunciations, to_ids, to_names
from b2t.errors import UserError
from b2t.evaluate.metrics import normalise_text
from b2t.records import write_atomically

Spelling = tuple[int, ...]

RULE = (
    "a word is pronounced as the phoneme labels of the training sentences have it (each "
    "pronunciation that is at least a tenth of the word's), else as the CMU dictionary lists it (a "
    "possessive from its noun, a compound from its parts), else it is left out and never decoded"
)

_RARE = 0.1


@dataclass(frozen=True)
class Lexicon:
    """Words and their pronunciations.

    Attributes:
        spellings: per word its pronunciations, each a tuple of class ids without silence.
        learnt: words pronounced as labels have it.
        missing: words of the text that have no pronunciation, sorted.
    """

    spellings: Mapping[str, Sequence[Spelling]]
    learnt: int = 0
    missing: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write one pronunciation per line: the word, a tab, phones separated by spaces."""
        lines = [
            f"{word}\t{' '.join(to_names(spelling))}\n"
            for word, spellings in sorted(self.spellings.items())
            for spelling in spellings
        ]
        write_atomically(path, "".join(lines))


def build_lexicon(
    words: Iterable[str], labelled: Iterable[tuple[str, Sequence[int]]] = ()
) -> Lexicon:
    """Find pronunciations of words; `RULE` says how.

    Args:
        words: normalised words.
        labelled: (text, phoneme class ids) of training sentences, silence after every word.

    Raises:
        UserError: no word has a pronunciation.
    """
    learnt = _learn(labelled)
    spellings: dict[str, list[Spelling]] = {}
    missing = []
    wanted = sorted(set(words))
    for word in wanted:
        found = learnt.get(word) or [tuple(to_ids(phones)) for phones in pronunciations(word)]
        if found:
            spellings[word] = list(dict.fromkeys(found))
        else:
            missing.append(word)
    if not spellings:
        raise UserError(
            f"none of {len(wanted):,} words has a pronunciation (the first: "
            f"{', '.join(wanted[:3]) or 'there are none'}): the lexicon is for English texts, or "
            "for datasets with phoneme labels"
        )
    return Lexicon(spellings, sum(word in learnt for word in spellings), missing)


def read_lexicon(path: Path) -> Lexicon:
    """Read a lexicon as `Lexicon.write` or a hand has written it.

    Raises:
        UserError: it is missing, empty, or a line has no word, no phones or an unknown phone.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no lexicon there; `b2t lm` makes one") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: not a text in UTF-8; expected lines of a word and phones"
        ) from None
    spellings: defaultdict[str, list[Spelling]] = defaultdict(list)
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        word, *phones = line.split()
        try:
            spelling = tuple(index for index in to_ids(phones) if index != SIL)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if not spelling:
            raise UserError(f"{path}, line {number}: no phones after {word!r}; expected some")
        if 0 in spelling:
            raise UserError(f"{path}, line {number}: BLANK is no phone of a word")
        spellings[word].append(spelling)
    if not spellings:
        raise UserError(f"{path}: no words; expected lines of a word, a tab and its phones")
    return Lexicon({word: list(dict.fromkeys(found)) for word, found in spellings.items()})


def split_words(labels: Sequence[int]) -> list[Spelling]:
    """Split class ids at silences; empty pieces are dropped."""
    pieces: list[list[int]] = [[]]
    for label in labels:
        if label == SIL:
            pieces.append([])
        else:
            pieces[-1].append(int(label))
    return [tuple(piece) for piece in pieces if piece]


def _learn(labelled: Iterable[tuple[str, Sequence[int]]]) -> dict[str, list[Spelling]]:
    """Pronunciations by word, the most frequent first, from sentences whose words match pieces."""
    seen: defaultdict[str, Counter[Spelling]] = defaultdict(Counter)
    for text, labels in labelled:
        words, pieces = normalise_text(text).split(), split_words(labels)
        if len(words) == len(pieces):
            for word, piece in zip(words, pieces, strict=True):
                seen[word][piece] += 1
    return {
        word: [
            spelling
            for spelling, count in counts.most_common()
            if count >= _RARE * sum(counts.values())
        ]
        for word, counts in seen.items()
    }
