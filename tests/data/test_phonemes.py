import pytest

from b2t.data.phonemes import (
    BLANK,
    PHONEMES,
    SIL,
    pronounce,
    sentence_to_ids,
    sentence_to_phones,
    to_ids,
    to_names,
    unpronounceable,
    words_of,
)
from b2t.errors import UserError


def test_inventory_is_that_of_the_release():
    assert len(PHONEMES) == 41 and len(set(PHONEMES)) == 41
    assert PHONEMES[BLANK] == "BLANK" and PHONEMES[SIL] == "SIL" and SIL == 40
    phones = list(PHONEMES[1:40])
    assert phones == sorted(phones)
    # Ids read from the public release: "DH AH" of "the", "HH" and "OW" of "hello".
    assert [PHONEMES.index(name) for name in ("AA", "DH", "AH", "HH", "OW", "ZH")] == [
        1,
        10,
        3,
        16,
        25,
        39,
    ]


def test_silence_follows_every_word():
    assert sentence_to_phones("The boy.") == ["DH", "AH", "SIL", "B", "OY", "SIL"]
    assert to_names(sentence_to_ids("The boy.")) == sentence_to_phones("the boy")


def test_stress_and_the_bar_of_the_release_are_understood():
    assert to_ids(["AH0", " ah1 ", "|", " | "]) == [3, 3, 40, 40]


@pytest.mark.parametrize(
    ("word", "phones"),
    [("cat's", "K AE T S"), ("nurse's", "N ER S IH Z"), ("glockenspiels'", None)],
)
def test_possessives(word, phones):
    if phones is None:
        with pytest.raises(KeyError):
            pronounce(word)
    else:
        assert " ".join(pronounce(word)) == phones


def test_possessive_missing_in_the_dictionary_follows_its_noun():
    assert pronounce("umbrella's") == (*pronounce("umbrella"), "Z")
    assert pronounce("sandwich's") == (*pronounce("sandwich"), "IH", "Z")
    assert pronounce("plumbers'") == pronounce("plumbers")


def test_words_of_keeps_apostrophes_inside_and_drops_quotes():
    assert words_of("I don’t 'know', the well-known cat's!") == [
        "i",
        "don't",
        "know",
        "the",
        "well",
        "known",
        "cat's",
    ]
    assert words_of("5 cafés") == ["5", "cafés"]


def test_unknown_words_are_named():
    assert unpronounceable(["the xqzt", "Boy, 7!"]) == ["7", "xqzt"]
    with pytest.raises(UserError, match="xqzt"):
        sentence_to_phones("the xqzt")
    with pytest.raises(UserError, match="no word"):
        sentence_to_phones("?!")
    with pytest.raises(UserError, match="'QX'"):
        to_ids(["AA", "QX"])
    with pytest.raises(UserError, match="41"):
        to_names([41])
