import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from b2t.errors import UserError
from b2t.evaluate.metrics import normalise_text
from b2t.evaluate.surface import learn_surface, read_surface

TEXTS = [
    "I think I know Peter.",
    "Did Peter call me?",
    "Well, I'm not sure.",
    "He said no.",
    "No, he will.",
    "It is 5 p.m. now.",
]


def test_sentences_are_written_as_in_the_text(tmp_path):
    forms = learn_surface(TEXTS)
    assert forms.endings == (".", "?") and forms.capital
    assert forms.words["i"] == "I" and forms.words["peter"] == "Peter"
    assert forms.render(["peter", "and", "i", "know"]) == ["Peter and I know.", "Peter and I know?"]
    assert "did" not in forms.words and "well" not in forms.words, "a first word's capital is none"
    assert forms.render([]) == [""]
    forms.write(tmp_path / "surface.json")
    assert read_surface(tmp_path / "surface.json") == forms


def test_plain_texts_stay_plain():
    forms = learn_surface(["see us", "say a", "I am"])
    assert not forms.capital and forms.endings == ("",)
    assert forms.render(["i", "see"]) == ["i see"]


@given(st.lists(st.sampled_from(sorted({w for t in TEXTS for w in normalise_text(t).split()}))))
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_scored_as_what_was_meant(words):
    assert {normalise_text(text) for text in learn_surface(TEXTS).render(words)} == {
        " ".join(words)
    }


def test_a_damaged_file_is_one_message(tmp_path):
    path = tmp_path / "surface.json"
    with pytest.raises(UserError, match="not there"):
        read_surface(path)
    for damage in ("{", '{"words": 3}', '{"other": 1}'):
        path.write_text(damage)
        with pytest.raises(UserError, match=r"surface.json: damaged"):
            read_surface(path)
