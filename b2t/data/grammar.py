"""Sentence grammars for simulated recordings: 50 words, and about 1,000.

A grammar is a context-free grammar written as text. Each line is ``NAME = alternative | …``;
upper-case tokens are rules, all others words. Sentences are drawn from it by expanding ``S`` and
are written as the T15 release writes them: a capital at the start, a full stop or question mark at
the end.
"""

from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from b2t.errors import UserError

GRAMMARS = (50, 1000)
"""Sizes of vocabulary that there is a grammar of (the second is nominal)."""

_FUNCTION_WORDS = "a an the my your our their his her some to of i you we they is are do not and"
_REPEATABLE = frozenset(_FUNCTION_WORDS.split())
_ATTEMPTS = 60


@dataclass(frozen=True)
class Grammar:
    """A context-free grammar over words.

    Attributes:
        rules: alternatives of each rule, every alternative a tuple of rules and words.
        words: fewest and most words of a sentence.
    """

    rules: dict[str, tuple[tuple[str, ...], ...]]
    words: tuple[int, int]

    @classmethod
    def parse(cls, text: str, words: tuple[int, int]) -> "Grammar":
        """Read a grammar from its text (see the module's docstring); ``#`` starts a comment.

        Raises:
            ValueError: a rule is used and not defined, or defined twice.
        """
        rules: dict[str, tuple[tuple[str, ...], ...]] = {}
        for line in text.replace("\\\n", " ").splitlines():
            line = line.split("#")[0].strip()
            if not line:
                continue
            name, _, body = line.partition("=")
            if name.strip() in rules:
                raise ValueError(f"rule {name.strip()} is defined twice")
            rules[name.strip()] = tuple(tuple(part.split()) for part in body.split("|"))
        used = {token for token in _tokens(rules) if token.isupper() and len(token) > 1}
        if missing := sorted((used | {"S"}) - rules.keys()):
            raise ValueError(f"rules used but not defined: {missing}")
        return cls(rules, words)

    def vocabulary(self) -> list[str]:
        """All words of the grammar, lower-case and sorted."""
        words = {token for token in _tokens(self.rules) if token not in self.rules}
        return sorted(word.lower() for word in words - {".", "?"})

    def draw(self, rng: np.random.Generator) -> str:
        """Draw one sentence of an allowed length in which no content word comes twice."""
        while True:
            tokens = self._expand("S", rng)
            words = [token for token in tokens if token not in (".", "?")]
            content = [word for word in words if word.lower() not in _REPEATABLE]
            if self.words[0] <= len(words) <= self.words[1] and len(set(content)) == len(content):
                return _written(words, tokens[-1] if tokens[-1] == "?" else ".")

    def draw_different(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw ``count`` sentences, no two with the same words.

        Raises:
            UserError: the grammar does not yield that many.
        """
        seen: dict[str, str] = {}
        for _ in range(_ATTEMPTS):
            for _ in range(count):
                text = self.draw(rng)
                seen.setdefault(text.rstrip(".?").lower(), text)
                if len(seen) == count:
                    return list(seen.values())
        raise UserError(
            f"asked for {count} different sentences, the grammar gave {len(seen)} in "
            f"{_ATTEMPTS * count} draws: ask for fewer trials or a larger --vocabulary"
        )

    def origin(self) -> dict[str, str | int]:
        """Empty: the size of its vocabulary names a grammar."""
        return {}

    def _expand(self, symbol: str, rng: np.random.Generator) -> list[str]:
        if symbol not in self.rules:
            return [symbol]
        alternatives = self.rules[symbol]
        chosen = alternatives[int(rng.integers(len(alternatives)))]
        return [token for part in chosen for token in self._expand(part, rng)]


def _tokens(rules: dict[str, tuple[tuple[str, ...], ...]]) -> set[str]:
    return {token for body in rules.values() for part in body for token in part}


def _written(words: list[str], mark: str) -> str:
    text = " ".join(words)
    return text[0].upper() + text[1:] + mark


def load_grammar(vocabulary: int) -> Grammar:
    """The grammar of a vocabulary of 50 or (about) 1,000 words, see `GRAMMARS`."""
    text = files("b2t.data").joinpath("grammars", f"english_{vocabulary}.txt").read_text("utf-8")
    return Grammar.parse(text, (3, 7) if vocabulary == 50 else (3, 12))
