"""Sentences without signals: which are taken, how they are cut, and the batches of them."""

import logging

import numpy as np
import pytest
from datasets import Dataset

from b2t.data.batches import SentenceRows, encode_texts, sentence_batches
from b2t.data.phonemes import SIL, sentence_to_ids
from b2t.data.texts import Sentence, read_sentences, sentences_checksum
from b2t.data.trials import trial_features
from b2t.errors import UserError
from b2t.model.tokenizer import bpe_tokenizer, byte_tokenizer


def trials(*texts, phonemes=True):
    rows = [
        {
            "signal": [[0.5, 1.0]] * 3, "text": text, "subject": None, "session": "a", "block": 1,
            "phonemes": sentence_to_ids(text) if phonemes and text else None, "trial": trial,
            "sampling_rate": 50.0, "split": "train",
        }
        for trial, text in enumerate(texts)
    ]  # fmt: skip
    return Dataset.from_list(rows, features=trial_features(2))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "more.txt"
    path.write_text(
        "# a comment\nThe  dog ran home.\n\nHello, WORLD!\nXqzt is no word.\nthe dog ran home\n"
        "Open the door.\n",
        "utf-8",
    )
    return path


def sentence(text, name="texts/1/1"):
    return Sentence(text, sentence_to_ids(text), name)


def test_sentences_of_trials_and_files_are_taken_once_and_none_that_is_held_out(file, caplog):
    with caplog.at_level(logging.INFO):
        found = read_sentences(
            [str(file)], trials("Hello world.", None), [trials("Open the door?")]
        )
    assert found == [
        sentence("Hello world.", "texts/0/0"), sentence("The dog ran home.", "texts/1/2"),
    ]  # fmt: skip
    assert "1 of 5 lines are learnt from; 3 are sentences of other splits" in caplog.text
    assert "1 have no pronunciation" in caplog.text


def test_trials_without_phonemes_bring_nothing(file):
    assert read_sentences([str(file)], trials("Hi.", phonemes=False), [])[0].text != "Hi."
    with pytest.raises(UserError, match="no sentence that can be pronounced"):
        read_sentences([], trials("Hi.", phonemes=False), [])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data.texts: .*none.txt cannot be read"):
        read_sentences([str(tmp_path / "none.txt")], trials("Hi."), [])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8"):
        read_sentences([str(tmp_path / "latin.txt")], trials("Hi."), [])


def test_the_checksum_is_that_of_what_is_learnt():
    some = [sentence("Open the door."), sentence("The dog ran home.")]
    assert sentences_checksum(some) == sentences_checksum(list(some))
    assert sentences_checksum(some) != sentences_checksum(some[::-1])
    assert sentences_checksum(some) != sentences_checksum([some[0]._replace(phonemes=[1]), some[1]])


def test_words_are_written_and_said_together():
    text = "Open the door."
    assert sentence(text).words() == [
        ("Open", sentence_to_ids("open")), (" the", sentence_to_ids("the")),
        (" door.", sentence_to_ids("door")),
    ]  # fmt: skip
    merged = Sentence(text, [1, 2, SIL, 3, SIL], "x")
    assert merged.words() == [(text, merged.phonemes)], "fewer are said than written"
    assert Sentence(text, [1, SIL, 2, SIL, 3], "x").words() == [(text, [1, SIL, 2, SIL, 3])]


def test_phrases_are_words_that_follow_each_other_and_change_with_the_epoch():
    whole = "They open the old door."
    tokenizer = bpe_tokenizer([whole, "the door is old"], 300)
    options = {"seed": 3, "phase": 1, "phrase_words": 2}
    rows = SentenceRows([sentence(whole)], tokenizer, 4, **options)
    found = [rows[(epoch, 0)] for epoch in range(60)]
    texts = {example.text for example in found}
    assert {len(text.split()) for text in texts} == {1, 2} and len(texts) == 5 + 4
    for example in found:
        assert example.text in whole and example.signal.shape == (1, 4)
        assert example.phonemes.tolist() == sentence_to_ids(example.text)
        assert example.labels.tolist() == encode_texts([example.text], tokenizer)[0].tolist()
    of_words = [encode_texts([text], tokenizer)[0][:-1] for text, _ in sentence(whole).words()]
    assert np.concatenate(of_words).tolist() == encode_texts([whole], tokenizer)[0][:-1].tolist(), (
        "the tokens of words are those of the sentence"
    )
    again = SentenceRows([sentence(whole)], tokenizer, 4, **options)
    assert [again[(epoch, 0)].text for epoch in range(60)] == [e.text for e in found]
    assert SentenceRows([sentence(whole)], tokenizer, 4, seed=3, phase=1)[(0, 0)].text == whole


def test_two_ranks_read_what_one_does_from_any_place():
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    some = [sentence(f"say {word} now", f"texts/1/{i}") for i, word in enumerate(words)]
    rows = SentenceRows(some, byte_tokenizer(), 2, seed=0, phase=0, phrase_words=2)
    alone = sentence_batches(rows, consumed=0, micro_batch=4)
    first = [next(alone)[0] for _ in range(5)]
    shares = [
        sentence_batches(rows, consumed=3, micro_batch=2, rank=rank, world=2) for rank in (0, 1)
    ]
    for batch in first[3:]:
        read = [next(share)[0] for share in shares]
        assert sorted(zip(batch.rows, batch.texts, strict=True)) == sorted(
            pair for part in read for pair in zip(part.rows, part.texts, strict=True)
        )
    with pytest.raises(UserError, match="the texts split has 10 rows"):
        next(sentence_batches(rows, consumed=0, micro_batch=11))
