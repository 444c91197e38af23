import numpy as np
import pytest

from b2t.data.grammar import Grammar, load_grammar
from b2t.data.phonemes import PHONEMES, sentence_to_phones, unpronounceable, words_of
from b2t.errors import UserError


@pytest.mark.parametrize(("vocabulary", "fewest", "most"), [(50, 50, 50), (1000, 950, 1150)])
def test_vocabulary_sizes_and_pronunciations(vocabulary, fewest, most):
    words = load_grammar(vocabulary).vocabulary()
    assert fewest <= len(words) <= most
    assert unpronounceable(words) == []


@pytest.mark.parametrize(("vocabulary", "shortest", "longest"), [(50, 3, 7), (1000, 3, 12)])
def test_sentences_are_many_different_and_in_the_vocabulary(vocabulary, shortest, longest):
    grammar = load_grammar(vocabulary)
    texts = grammar.draw_different(5000, np.random.default_rng(0))
    words = [tuple(words_of(text)) for text in texts]
    assert len(set(words)) == 5000
    assert {len(sentence) for sentence in words} <= set(range(shortest, longest + 1))
    used = {word for sentence in words for word in sentence}
    assert used <= set(grammar.vocabulary())
    assert len(used) > 0.98 * len(grammar.vocabulary())
    assert all(text[0].isupper() and text[-1] in ".?" for text in texts)


def test_all_but_the_rarest_phone_are_spoken():
    grammar = load_grammar(50)
    texts = grammar.draw_different(1000, np.random.default_rng(0))
    spoken = {phone for text in texts for phone in sentence_to_phones(text)}
    assert set(PHONEMES[1:]) - spoken == {"ZH"}


def test_no_content_word_twice():
    grammar = Grammar.parse("S = the NOUN and the NOUN .\nNOUN = dog | cat", (1, 9))
    rng = np.random.default_rng(0)
    assert {grammar.draw(rng) for _ in range(50)} == {
        "The dog and the cat.",
        "The cat and the dog.",
    }


def test_alternatives_are_equally_likely():
    grammar = Grammar.parse("S = WORD .\nWORD = one | two | three | four", (1, 1))
    rng = np.random.default_rng(0)
    drawn = [grammar.draw(rng) for _ in range(4000)]
    shares = [drawn.count(text) / 4000 for text in ("One.", "Two.", "Three.", "Four.")]
    np.testing.assert_allclose(shares, 0.25, atol=0.03)


def test_errors():
    with pytest.raises(ValueError, match="NOUN"):
        Grammar.parse("S = the NOUN", (1, 9))
    with pytest.raises(ValueError, match="twice"):
        Grammar.parse("S = the\nS = a", (1, 9))
    small = Grammar.parse("S = yes . | no .", (1, 1))
    with pytest.raises(UserError, match="gave 2"):
        small.draw_different(3, np.random.default_rng(0))
