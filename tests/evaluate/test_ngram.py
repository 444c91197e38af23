import itertools
import math

import numpy as np
import pytest

from b2t.errors import UserError
from b2t.evaluate.ngram import BEGIN, END, UNKNOWN, estimate


def random_text(sentences=400, words=12, seed=0):
    """Sentences of a first-order chain, so that orders differ."""
    generator = np.random.default_rng(seed)
    chain = generator.dirichlet(np.full(words, 0.3), words)
    text = []
    for _ in range(sentences):
        word, sentence = int(generator.integers(words)), []
        for _ in range(int(generator.integers(1, 9))):
            sentence.append(f"w{word}")
            word = int(generator.choice(words, p=chain[word]))
        text.append(sentence)
    return text


class Plain:
    """Interpolated modified Kneser–Ney written down as the recursion of Chen and Goodman (1998)."""

    def __init__(self, text, order):
        self.order, self.text = order, [[BEGIN, *s, END] for s in text]
        self.vocabulary = {w for s in text for w in s} | {END, UNKNOWN}

    def count(self, gram):
        """Occurrences of the highest order and of beginnings; else distinct words before."""
        found = [
            (s[i - 1] if i else None)
            for s in self.text
            for i in range(len(s) - len(gram) + 1)
            if tuple(s[i : i + len(gram)]) == gram
        ]
        if len(gram) == self.order or gram[0] == BEGIN:
            return len(found)
        return len(set(found) - {None})

    def grams(self, n):
        return {tuple(s[i : i + n]) for s in self.text for i in range(len(s) - n + 1)} - {(BEGIN,)}

    def discount(self, n, count):
        of = [0] * 5
        for gram in self.grams(n):
            if self.count(gram) <= 4:
                of[self.count(gram)] += 1
        y = of[1] / (of[1] + 2 * of[2])
        k = min(count, 3)
        return k - (k + 1) * y * of[k + 1] / of[k] if k else 0.0

    def probability(self, context, word):
        n = len(context) + 1
        lower = 1 / len(self.vocabulary) if n == 1 else self.probability(context[1:], word)
        after = {gram[-1]: self.count(gram) for gram in self.grams(n) if gram[:-1] == context}
        total = sum(after.values())
        if not total:
            return lower
        left = sum(self.discount(n, count) for count in after.values()) / total
        here = after.get(word, 0)
        return (here - self.discount(n, here)) / total + left * lower


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_are_those_of_the_recursion(order):
    text = random_text(50, words=40, seed=2)
    model, plain = estimate(text, order), Plain(text, order)
    assert all(model.discounts), "the text is large enough to estimate discounts"
    for words in [*text[:5], ["w0", "w1"], ["w3"], ["w2", "w2", "w5"], []]:
        expected, history = 0.0, (BEGIN,)
        for word in (*words, END):
            context = history[max(0, len(history) - order + 1) :] if order > 1 else ()
            word = word if word in plain.vocabulary else UNKNOWN
            expected += math.log10(plain.probability(context, word))
            history = (*history, word)
        assert model.score(words) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("order", "prune"), [(1, [0]), (3, [0]), (4, [0, 0, 1]), (3, [0, 2, 3])])
def test_probabilities_after_any_history_sum_to_one(order, prune):
    model = estimate(random_text(), order, prune)
    vocabulary = [*model.words, END, UNKNOWN]
    for history in itertools.product([BEGIN, "w1", "w7", UNKNOWN], repeat=2):
        total = sum(10 ** model._next(history, word) for word in vocabulary)
        assert total == pytest.approx(1.0, abs=1e-9), history


def test_pruning_leaves_out_what_is_rare_and_what_hangs_on_it():
    text = random_text()
    whole, pruned = estimate(text, 3), estimate(text, 3, [0, 0, 2])
    assert len(pruned.log_probability[2]) < len(whole.log_probability[2])
    assert pruned.log_probability[1].keys() == whole.log_probability[1].keys()
    for gram in pruned.log_probability[2]:
        assert gram[1:] in pruned.log_probability[1] and gram[:-1] in pruned.log_probability[1]


def test_higher_orders_fit_text_of_a_chain_better():
    train, held_out = random_text(800), random_text(800)[600:]
    train = train[:600]
    one, two = (estimate(train, order).perplexity(held_out) for order in (1, 2))
    assert two < 0.8 * one


def test_a_small_text_falls_back_to_fixed_discounts():
    model = estimate([["a", "b"]], 2)
    assert model.discounts == [None, None]
    # p(a) = (1 - 0.5) / 3 + 0.5 / 4 of unigrams; p(a | <s>) = 0.5 + 0.5 p(a).
    assert 10 ** model._next((BEGIN,), "a") == pytest.approx(0.5 + 0.5 * (0.5 / 3 + 0.5 / 4))


def test_kenlm_reads_the_file_and_scores_alike(tmp_path):
    kenlm = pytest.importorskip("flashlight.lib.text.decoder.kenlm")
    from flashlight.lib.text.dictionary import Dictionary

    model = estimate(random_text(), 3, [0, 0, 1])
    model.write(tmp_path / "lm.arpa")
    words = Dictionary()
    for word in [*model.words, UNKNOWN]:
        words.add_entry(word)
    reader = kenlm.KenLM(str(tmp_path / "lm.arpa"), words)
    for sentence in [["w1", "w2", "w3"], ["w4"], ["w9", "nowhere", "w1", "w1"]]:
        state, total = reader.start(False), 0.0
        for word in sentence:
            index = words.get_index(word if word in model.words else UNKNOWN)
            state, score = reader.score(state, index)
            total += score
        total += reader.finish(state)[1]
        assert total == pytest.approx(model.score(sentence), abs=1e-4)


def test_options_that_cannot_be_are_refused():
    for order, prune in ((0, [0]), (3, [1]), (3, [0, 2, 1])):
        with pytest.raises(UserError):
            estimate([["a"]], order, prune)
    with pytest.raises(UserError, match="no words"):
        estimate([[]])
