"""How plain words are written: the capitals and full stops that a language model has read.

Words from phonemes come in lower case and without punctuation; a text decoder and a causal
language model were trained on sentences as people write them, and judge plain ones as odd.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from b2t.errors import UserError
from b2t.evaluate.metrics import normalise_text
from b2t.records import write_atomically

_ENDING = re.compile(r"[.!?…]*$")
_AROUND = '.,!?;:…"“”()[]'
_SHARE, _ENDINGS = 0.05, 3


class SurfaceForms(BaseModel):
    """Spelling of plain words in sentences, learnt from texts.

    Attributes:
        words: plain words that are mostly written otherwise (`i` as `I`).
        capital: whether sentences begin with a capital.
        endings: what closes a sentence, the most frequent first; those of 5 % at least, 3 at most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    words: dict[str, str] = {}
    capital: bool = False
    endings: tuple[str, ...] = ("",)

    def render(self, words: Sequence[str]) -> list[str]:
        """Write a sentence of plain words, once with each ending."""
        if not words:
            return [""]
        text = " ".join(self.words.get(word, word) for word in words)
        text = text[0].upper() + text[1:] if self.capital else text
        return [text + ending for ending in self.endings]

    def write(self, path: Path) -> None:
        """Write as JSON."""
        write_atomically(path, self.model_dump_json(indent=1) + "\n")


def learn_surface(texts: Iterable[str]) -> SurfaceForms:
    """Learn spellings from sentences as they stand.

    The first word of a sentence tells nothing of a word's own capital. Sentences of which a word
    falls apart or vanishes when it is scored (see `normalise_text`) teach no spellings.
    """
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    endings: Counter[str] = Counter()
    capitals = sentences = 0
    for text in filter(None, (text.strip() for text in texts)):
        sentences += 1
        ending = _ENDING.search(text)
        endings[ending[0] if ending else ""] += 1
        capitals += text[0].isupper()
        raw, plain = text.split(), normalise_text(text).split()
        if len(raw) != len(plain):
            continue
        for token, word in list(zip(raw, plain, strict=True))[1:]:
            form = token.strip(_AROUND)
            if normalise_text(form) == word:
                seen[word][form] += 1
    forms = {word: counts.most_common(1)[0][0] for word, counts in sorted(seen.items())}
    kept = [e for e, count in endings.most_common(_ENDINGS) if count >= _SHARE * sentences]
    return SurfaceForms(
        words={word: form for word, form in forms.items() if form != word},
        capital=2 * capitals > sentences,
        endings=tuple(kept) or ("",),
    )


def read_surface(path: Path) -> SurfaceForms:
    """Read what `SurfaceForms.write` has written.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return SurfaceForms.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path}: not there; rescoring needs it: make the language model anew with `b2t lm`"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: damaged ({first['msg']}); make it anew with `b2t lm`") from None
