import hashlib
import json
from collections import Counter
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from b2t.data.phonemes import sentence_to_ids, unpronounceable, words_of
from b2t.data.sentence_source import SentenceList, load_source
from b2t.data.simulate import SimulationConfig, Simulator, plan_blocks, simulate
from b2t.errors import UserError

TEN = [
    "I am cold.",
    "Where is my dog?",
    "Please stay, it's late.",
    "She laughed until she cried.",
    "Nobody told me.",
    "We'll see about that.",
    "It rained all night.",
    "My head hurts.",
    "Do you remember the train?",
    "Not yet, thank you.",
]


def parse(*lines):
    return SentenceList.parse("\n".join(lines).encode(), "mine.txt")


def planned(config):
    return [text for block in plan_blocks(config) for text in block.sentences]


@pytest.fixture(scope="module")
def everyday():
    return load_source("everyday")


def test_everyday_sentences_are_different_and_written_as_the_release_writes(everyday):
    keys = {" ".join(words_of(text)) for text in everyday.texts}
    assert len(keys) == len(everyday.texts) >= 2400
    assert everyday.repeated == 0
    lengths = [len(words_of(text)) for text in everyday.texts]
    assert min(lengths) >= 3 and max(lengths) <= 14
    assert 6.5 < np.mean(lengths) < 8
    assert all(text[0].isupper() and text[-1] in ".?" for text in everyday.texts)
    assert not set("".join(everyday.texts)) & set('0123456789!;:-"()')


def test_everyday_vocabulary_is_closed_and_every_word_frequent(everyday):
    counts = Counter(word for text in everyday.texts for word in set(words_of(text)))
    assert 350 <= len(counts) <= 450
    assert min(counts.values()) >= 5
    assert unpronounceable(everyday.texts) == []
    assert everyday.vocabulary() == sorted(counts)


def test_everyday_sentences_are_no_template_with_changing_slots(everyday):
    # Filling one slot of a frame with ten words would give ten sentences with one key.
    frames = Counter()
    for text in everyday.texts:
        words = words_of(text)
        frames.update((*words[:i], "_", *words[i + 1 :]) for i in range(len(words)))
    shared = sum(count for frame, count in frames.items() if count > 1 and len(frame) > 3)
    assert shared < 0.02 * len(everyday.texts)
    openings = Counter(tuple(words_of(text)[:4]) for text in everyday.texts)
    assert openings.most_common(1)[0][1] < 0.01 * len(everyday.texts)


@pytest.mark.parametrize(
    ("vocabulary", "seed", "digest"),
    [
        (50, 0, "f0c11f341f3677916785ae57f0d75a6ab1ac25bd17b57a764d08c74f3dae8933"),
        (50, 7, "3d31080441fd5780183aeab6824fa6f2996e8f3078aea35c31b1c966fdaaa6a8"),
        (1000, 0, "5c4f31314c48f8061246529291b66ab2f3a8c32e4a41c2c43fc2539d4f3ba573"),
        (1000, 7, "fe2538dd2a3d3409e162c4cd8cf0299e48cbfa59f73a4eb18deef13c93c82919"),
    ],
)
def test_grammars_give_the_sentences_of_version_0_1(vocabulary, seed, digest):
    # Figures published on simulated recordings stay comparable only while these do not change.
    config = SimulationConfig(sessions=3, trials=(300, 40, 40), vocabulary=vocabulary, seed=seed)
    assert hashlib.sha256("\n".join(planned(config)).encode()).hexdigest() == digest


def test_seeds_draw_other_sentences_and_none_twice(everyday):
    config = SimulationConfig(sessions=3, trials=(1000, 100, 100), vocabulary="everyday")
    texts, other = planned(config), planned(replace(config, seed=1))
    assert len(set(texts)) == 1200
    assert set(texts) <= set(everyday.texts)
    assert planned(config) == texts
    # Two random draws of 1,200 share 1,200² / 2,561 = 562 sentences; a fixed head would share all.
    assert 500 < len(set(texts) & set(other)) < 630
    assert texts[:100] != other[:100]


def test_a_whole_list_is_used_before_it_is_too_short(tmp_path):
    path = tmp_path / "ten.txt"
    path.write_text("\n".join(TEN))
    config = SimulationConfig(sessions=1, trials=(8, 1, 1), vocabulary=path)
    assert sorted(planned(config)) == sorted(TEN)
    with pytest.raises(UserError, match=r"asked for 11 .*ten\.txt holds 10"):
        planned(replace(config, trials=(8, 2, 1)))


def test_single_draws_come_from_the_whole_list():
    rng = np.random.default_rng(0)
    source = parse(*TEN)
    drawn = Counter(source.draw(rng) for _ in range(5000))
    assert set(drawn) == set(TEN)
    np.testing.assert_allclose([count / 5000 for count in drawn.values()], 0.1, atol=0.02)


def test_comments_blank_lines_and_repeats():
    source = parse("# Of mine", "", "I'm  cold.", "  I’m cold?", "i'm cold", "You are\tcold.\r", "")
    assert source.texts == ("I'm cold.", "You are cold.")
    assert source.repeated == 2
    assert source.vocabulary() == ["are", "cold", "i'm", "you"]
    assert SentenceList.parse(b"\xef\xbb\xbfI am here.", "mine.txt").texts == ("I am here.",)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["I am.", "", "The zorp is.", "A Quxly zorp."], r"line 3: .*'zorp'.*nor of 1 other word "),
        (["The zorp is.", "A Quxly plivv."], r"line 1: .*'zorp'.*nor of 2 other words "),
        (["The zorp is.", "A zorp."], r"line 1: .*'zorp' in the CMU dictionary; respell"),
        (["I am 3 years old."], r"line 1: .*'3'"),
        (["I am.", "..."], r"line 2: no word in '\.\.\.'"),
        (["Wait … for me."], r"line 1: '…' is not ASCII"),
        (["through " * 62 + "dog."], r"line 1: 500 characters"),
        (["w " * 100 + "w."], r"line 1: 202 characters and 808 phonemes"),
        (["# nothing but a comment", ""], "holds no sentence"),
    ],
)
def test_faulty_lists_name_line_and_word(lines, message):
    with pytest.raises(UserError, match=rf"^mine\.txt.*{message}"):
        parse(*lines)


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(UserError, match=r"absent\.txt: No such file"):
        load_source(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="Is a directory"):
        load_source(tmp_path)
    (tmp_path / "latin.txt").write_bytes("Café.".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_source(tmp_path / "latin.txt")
    with pytest.raises(UserError, match="unknown vocabulary daily: expected one of 50, 1000, ever"):
        load_source("daily")


def test_longest_sentence_that_fits_is_written(tmp_path):
    # 499 characters; and 125 words of 3 phones and a silence, 500 labels.
    longest = ["through " * 62 + "no.", "dog " * 124 + "dog"]
    assert len(longest[0]) == 499 and len(sentence_to_ids(longest[1])) == 500
    path = tmp_path / "long.txt"
    path.write_text("\n".join([*longest, "I am cold."]))
    config = SimulationConfig(sessions=1, trials=(1, 1, 1), electrodes=4, vocabulary=path)
    assert simulate(config, tmp_path / "out").is_dir()


def test_record_names_the_source(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n".join([*TEN, "i am cold"]))
    config = SimulationConfig(sessions=1, trials=(4, 1, 1), electrodes=4, vocabulary=path)
    simulate(config, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "simulation.json").read_text())
    assert record["config"]["vocabulary"] == "mine.txt"
    assert record["sentences"] == {
        "file": "mine.txt",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "sentences": 10,
        "repeated": 1,
        "words": len({word for text in TEN for word in words_of(text)}),
    }
    simulate(replace(config, vocabulary=50), tmp_path / "grammar")
    record = json.loads((tmp_path / "grammar" / "simulation.json").read_text())
    assert record["config"]["vocabulary"] == 50 and "sentences" not in record


def test_built_in_list_is_recorded_with_its_checksum():
    content = files("b2t.data").joinpath("sentences", "everyday.txt").read_bytes()
    assert load_source("everyday").origin()["sha256"] == hashlib.sha256(content).hexdigest()


def test_reference_for_the_regressors_comes_from_the_list(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(TEN))
    config = SimulationConfig(sessions=1, trials=(4, 1, 1), electrodes=4, vocabulary=path)
    mine, grammar = Simulator(config)._scale, Simulator(replace(config, vocabulary=50))._scale
    assert not np.allclose(mine[0], grammar[0])
