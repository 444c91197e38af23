import itertools
import json
import math
import re

import pytest
import torch

from b2t.data.phonemes import SIL, sentence_to_ids, to_ids
from b2t.errors import UserError
from b2t.evaluate import decode_command, evaluate_command, lm_command
from b2t.evaluate.language_model import TextSource, known_share, make, open_decoder, read_card, tune
from b2t.evaluate.lexicon import build_lexicon, read_lexicon
from b2t.evaluate.ngram import estimate
from tests.evaluate.saved_runs import call, save_dataset, save_run

pytest.importorskip("flashlight.lib.text.decoder", reason="flashlight-text has no wheel here")

from b2t.evaluate.word_stream import WordStream
from b2t.evaluate.words import PhonemeBeam, SearchOptions, WordDecoder, emissions

WORDS = {"see": "S IY", "say": "S EY", "a": "AH", "us": "AH S"}
TEXT = [["see", "us"], ["say", "a"], ["see", "a", "say"], ["us"], ["say", "us"]] * 3


def lexicon_of(words):
    return build_lexicon(words, [(w, [*to_ids(p.split()), SIL]) for w, p in words.items()])


def random_logits(frames, seed, used=("S", "IY", "EY", "AH", "SIL", "BLANK")):
    """Logits over few classes, so that every reading of them can be written down."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((frames, 41), -30.0)
    index = [0 if name == "BLANK" else to_ids([name])[0] for name in used]
    logits[:, index] = 2 * torch.randn(frames, len(index), generator=generator)
    return logits


def ctc(frames, labels):
    """Log-probability of a label sequence by the library that trains with it."""
    loss = torch.nn.functional.ctc_loss(
        frames[:, None].double(),
        torch.tensor([labels]),
        torch.tensor([len(frames)]),
        torch.tensor([len(labels)]),
        reduction="sum",
    )
    return -float(loss) if math.isfinite(float(loss)) else -math.inf


LETTERS = {"S": "S", "IY": "I", "EY": "E", "AH": "A", "SIL": "[|]", "BLANK": "_"}


def alignments(words):
    """Every alignment of a sentence as a regular expression over one letter per frame.

    A word ends in a silence, however long its last phone lasts, or in one frame of its last phone;
    silences and blanks come and go between words.
    """
    pattern = "[|_]*"
    for word in words:
        *head, last = [LETTERS[phone] for phone in WORDS[word].split()]
        head = "".join(f"{phone}+_*" for phone in head)
        pattern += f"{head}(?:{last}+_*[|]|{last}(?!{last}))[|_]*"
    return re.compile(pattern)


@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_the_best_of_all_sentences(seed, tmp_path):
    """Against every alignment of every sentence of up to three words."""
    lexicon, model = lexicon_of(WORDS), estimate(TEXT, 2)
    model.write(tmp_path / "lm.arpa")
    options = SearchOptions(
        lm_weight=1.5, word_score=-0.3, beam_size=500, beam_threshold=1e4, log_add=False
    )
    decoder = WordDecoder(tmp_path / "lm.arpa", lexicon, options)
    frames = emissions(random_logits(5, seed)[None], torch.ones(1, 5, dtype=torch.bool))[0]
    classes = [0 if name == "BLANK" else to_ids([name])[0] for name in LETTERS]
    letters = [letter.strip("[]") for letter in LETTERS.values()]
    steps = [list(zip(letters, row, strict=True)) for row in frames[:, classes].tolist()]
    paths = [
        ("".join(letter for letter, _ in path), sum(score for _, score in path))
        for path in itertools.product(*steps)
    ]
    scores = {}
    for words in itertools.chain.from_iterable(
        itertools.product(WORDS, repeat=n) for n in range(4)
    ):
        accepts = alignments(words).fullmatch
        best = max((score for path, score in paths if accepts(path)), default=-math.inf)
        scores[" ".join(words)] = best + 1.5 * model.score(words) - 0.3 * len(words)
    ordered = sorted(scores, key=scores.__getitem__, reverse=True)[:3]
    found = decoder.n_best(frames, 3)
    assert [h.text for h in found] == ordered
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(scores[hypothesis.text], abs=1e-3)
        assert hypothesis.lm == pytest.approx(model.score(hypothesis.text.split()), abs=1e-4)


def test_frames_under_the_mask_and_neighbours_change_nothing(tmp_path):
    make([TextSource("t", ["see us", "say a", "see a say"], [None] * 3)], tmp_path)
    decoder, _ = open_decoder(tmp_path)
    rows = [random_logits(n, n) for n in (9, 4, 0, 12)]
    batch = torch.full((4, 12, 41), 50.0)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    for i, row in enumerate(rows):
        batch[i, : len(row)], mask[i, : len(row)] = row, True
    alone = [
        decoder.decode(row[None], torch.ones(1, len(row), dtype=torch.bool))[0] for row in rows
    ]
    assert decoder.decode(batch, mask) == alone
    assert alone[2] == ""


@pytest.mark.parametrize("seed", range(3))
def test_prefix_beam_sums_over_alignments(seed):
    """Against every label sequence of up to four classes over five frames."""
    frames = random_logits(5, seed, ("S", "IY", "BLANK"))
    classes = to_ids(["S", "IY"])
    readings = [list(labels) for n in range(5) for labels in itertools.product(classes, repeat=n)]
    best = max(readings, key=lambda labels: ctc(frames.log_softmax(-1), labels))
    found = PhonemeBeam(100).decode(frames[None], torch.ones(1, 5, dtype=torch.bool))
    assert found == [best]


def test_logits_that_are_not_finite_are_refused():
    logits = torch.zeros(1, 3, 41)
    logits[0, 1, 2] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        emissions(logits, torch.ones(1, 3, dtype=torch.bool))
    mask = torch.tensor([[True, False, True]])
    assert emissions(logits, mask)[0].shape == (2, 41)


def test_pronunciations_come_from_labels_then_the_dictionary():
    """ "the" is said in two ways, a third is too rare; "cat" no label shows; "qqq" nobody knows."""
    the = [*[("the", ["DH", "AH"])] * 12, *[("the", ["DH", "IY"])] * 4, ("the", ["D", "AH"])]
    labelled = [(text, [*to_ids(phones), SIL]) for text, phones in the]
    labelled.append(("the cat", [*to_ids(["DH", "AH"])]))  # words and pieces differ: not learnt
    lexicon = build_lexicon(["the", "cat", "qqq", "well-known", "cat's"], labelled)
    assert lexicon.spellings["the"] == [tuple(to_ids(p)) for p in (["DH", "AH"], ["DH", "IY"])]
    assert lexicon.spellings["cat"] == [tuple(to_ids(["K", "AE", "T"]))]
    assert lexicon.spellings["well-known"] == [tuple(to_ids(["W", "EH", "L", "N", "OW", "N"]))]
    assert lexicon.spellings["cat's"] == [tuple(to_ids(["K", "AE", "T", "S"]))]
    assert lexicon.missing == ["qqq"] and lexicon.learnt == 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("cat", "no phones"),
        ("cat\tK XX T", "XX"),
        ("cat\tBLANK", "BLANK"),
        ("cat\tSIL", "no phones"),
    ],
)
def test_a_damaged_lexicon_names_its_line(tmp_path, line, told):
    path = tmp_path / "lexicon.txt"
    path.write_text(f"a\tAH\n\n{line}\n")
    with pytest.raises(UserError, match=rf"lexicon.txt, line 3.*{told}"):
        read_lexicon(path)


def test_a_lexicon_is_read_as_it_was_written(tmp_path):
    lexicon = build_lexicon(["the", "cat", "read"])
    lexicon.write(tmp_path / "lexicon.txt")
    assert read_lexicon(tmp_path / "lexicon.txt").spellings == lexicon.spellings
    assert len(lexicon.spellings["read"]) == 2


def test_damaged_language_models_are_one_message(tmp_path):
    make([TextSource("t", ["see us", "say a"], [None] * 2)], tmp_path)
    arpa, card = (tmp_path / "lm.arpa"), (tmp_path / "lm.json")
    whole, text = arpa.read_text(), card.read_text()
    for damaged in (
        "",
        whole[: len(whole) // 2],
        whole.replace("ngram 1=", "ngram 1=9"),
        "\0" * 99,
    ):
        arpa.write_text(damaged)
        with pytest.raises(UserError, match=r"lm.arpa: not a sound ARPA"):
            open_decoder(tmp_path)
    arpa.unlink()
    with pytest.raises(UserError, match="no language model there"):
        open_decoder(tmp_path)
    arpa.write_text(whole)
    for damaged in ("{", text.replace('"lm_weight": 2.0', '"lm_weight": -1')):
        card.write_text(damaged)
        with pytest.raises(UserError, match=r"lm.json"):
            open_decoder(tmp_path)


def noisy_logits(text, seed, strength=3.0):
    """Logits of a sentence whose blanks are favoured, as those of a trained CTC model."""
    labels = sentence_to_ids(text)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3 * len(labels), 41, generator=generator)
    logits[:, 0] += 6
    logits[torch.arange(len(labels)) * 3 + 1, labels] += strength
    return logits


def test_tuning_lowers_the_errors_and_is_recorded(tmp_path):
    texts = ["i am cold", "water please", "no i am fine", "please call me", "i need help now"]
    make([TextSource("t", texts, [None] * 5)], tmp_path)
    decoder, _ = open_decoder(tmp_path, beam_size=20)
    rows = [noisy_logits(text, i) for i, text in enumerate(texts * 2)]
    chosen, wer, before, tries = tune(decoder, rows, texts * 2)
    assert wer < before and tries > 15
    said = [decoder.decode(row[None], torch.ones(1, len(row), dtype=torch.bool))[0] for row in rows]
    wrong = sum(a != b for a, b in zip(said, texts * 2, strict=True))
    assert decoder.options == chosen and (wer == 0) == (wrong == 0)


def test_a_lexicon_alone_does_not_care_what_was_said_often(tmp_path):
    said, read = ["i am cold", "no i am fine", "call me now"], []
    rows = [noisy_logits(text, i) for i, text in enumerate(said * 2)]
    for name, often in (("a", 0), ("b", 2)):
        source = TextSource("t", said + [said[often]] * 20, [None] * 23)
        make([source], tmp_path / name, lexicon_only=True)
        decoder, card = open_decoder(tmp_path / name, beam_size=20)
        assert card.search.lm_weight == 0
        chosen, *_ = tune(decoder, rows, said * 2)
        assert chosen.lm_weight == 0
        masks = [torch.ones(1, len(row), dtype=torch.bool) for row in rows]
        texts = zip(rows, masks, strict=True)
        read.append([decoder.decode(row[None], mask)[0] for row, mask in texts])
    assert read[0] == read[1]


def test_words_that_sound_alike_are_read_the_same_way_at_each_call(tmp_path):
    """Without weight of the n-grams the first by its letters; all stand among more readings."""
    words = {**dict.fromkeys(("two", "too", "to"), "T UW"), "eye": "AY", "i": "AY", "scream": "S K"}
    model, lexicon = estimate([[word] for word in words], 2), lexicon_of(words)
    model.write(tmp_path / "lm.arpa")
    labels = to_ids(["AY", "SIL", "S", "K", "SIL", "T", "UW", "SIL", "AY", "SIL"])
    frames = torch.full((2 * len(labels), 41), -9.0)
    frames[torch.arange(len(labels)) * 2, labels] = frames[1::2, 0] = 9.0
    row = emissions(frames[None], torch.ones(1, len(frames), dtype=torch.bool))[0]
    alike = [" ".join(each) for each in itertools.product(
        ("eye", "i"), ("scream",), ("to", "too", "two"), ("eye", "i")
    )]  # fmt: skip
    for _ in range(3):
        decoder = WordDecoder(tmp_path / "lm.arpa", lexicon, SearchOptions(lm_weight=0))
        for _ in range(3):
            assert decoder.n_best(row, 1)[0].text == alike[0]
            assert [each.text for each in decoder.n_best(row, 12)] == alike
        stream = WordStream(decoder)
        stream.push(frames)
        assert stream.finish() == alike[0]
        every = decoder.with_options(SearchOptions(lm_weight=1.0))
        assert len({each.text for each in every.n_best(row, 12)}) == 12


def test_words_outside_the_vocabulary_break_sentences(tmp_path):
    source = TextSource("t", ["i xqzt am", "i am", "i am", "Am I?"], [None] * 4)
    card, model = make([source], tmp_path, order=2)
    assert card.left_out == ["xqzt"] and card.words == 2
    assert ("i", "am") in model.log_probability[1]
    assert known_share(tmp_path, ["Am I.", "am am"]) == 0.5
    few, _ = make([source], tmp_path, max_words=1)
    assert few.words == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return save_run(root / "demo", save_dataset(root / "data"))


def test_from_a_dataset_to_words(run, tmp_path, capsys):
    data, folder = run.parent / "data", tmp_path / "lm"
    (tmp_path / "more.txt").write_text("water please now\n\nplease\n")
    assert call(lm_command, data, tmp_path / "more.txt", "--out", folder, "--tune", run) == 0
    assert "tuned on 4 trials of val" in capsys.readouterr().out
    card = read_card(folder)
    assert card.sentences == 5 and card.tuned is not None and card.tuned.split == "val"
    assert call(evaluate_command, run, "--lm", folder, "--out", tmp_path) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "words by language model" in printed and "stand in the language model's text" in printed
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["wer_lm"] is not None and record["wer_lm_noise"] is not None
    assert record["language_model"]["lm_weight"] == card.search.lm_weight
    assert not any("tuned the weights" in note for note in record["notes"])
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    vocabulary = {"water", "please", "now", "yes", "no", "ok"}
    assert all(set(row["lm_prediction"].split()) <= vocabulary for row in rows)
    call(evaluate_command, run, "--lm", folder, "--split", "val", "--out", tmp_path, "--no-noise")
    notes = json.loads((tmp_path / "evaluation.json").read_text())["notes"]
    assert any("val split tuned the weights" in note for note in notes)
    capsys.readouterr()
    call(decode_command, run, data, "--lm", folder)
    lines = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert lines == {row["row"]: row["joint_prediction"] for row in rows}
    with pytest.raises(UserError, match=r"lm: holds a language model whose .* without --tune"):
        call(lm_command, data, "--out", folder)
    assert read_card(folder) == card


def test_a_wrong_language_model_is_told_before_a_model_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr("b2t.evaluate.run_folder.load_model", None)
    for command, *arguments in (
        (evaluate_command, run),
        (decode_command, run, run.parent / "data"),
    ):
        with pytest.raises(UserError, match=r"nowhere: no language model there"):
            call(command, *arguments, "--lm", tmp_path / "nowhere")


def test_a_split_that_was_trained_on_does_not_tune(run, tmp_path):
    with pytest.raises(UserError, match="was trained on it"):
        call(
            lm_command,
            run.parent / "data",
            "--out",
            tmp_path,
            "--tune",
            run,
            "--tune-split",
            "train",
        )


def test_nothing_to_learn_from_is_told(tmp_path):
    (tmp_path / "empty.txt").write_text("\n?!\n")
    (tmp_path / "strange.txt").write_text("xqzt qqqx\n")
    for source, told in (("empty.txt", "no text"), ("strange.txt", "has a pronunciation")):
        with pytest.raises(UserError, match=told):
            call(lm_command, tmp_path / source, "--out", tmp_path / "lm")
    with pytest.raises(UserError, match="no such file"):
        call(lm_command, tmp_path / "none.txt", "--out", tmp_path / "lm")
    (tmp_path / "known.txt").write_text("water please\n")
    with pytest.raises(UserError, match="no such run folder"):
        call(lm_command, tmp_path / "known.txt", "--out", tmp_path / "lm", "--tune", "nowhere")
    assert not (tmp_path / "lm").exists(), "nothing is made for a run that is not there"
    (tmp_path / "news").write_text("water please\n")
    with pytest.raises(UserError, match=r"news: expected a dataset, or .* ends in \.txt"):
        call(lm_command, tmp_path / "news", "--out", tmp_path / "lm")
    with pytest.raises(UserError, match="name a dataset"):
        call(lm_command, "--out", tmp_path / "lm")
    for order in (1, 7):
        with pytest.raises(UserError, match=rf"--order {order}: KenLM.*2 to 6 words"):
            call(lm_command, tmp_path / "strange.txt", "--out", tmp_path / "lm", "--order", order)


def test_words_as_frames_come_are_those_of_whole_trials(tmp_path):
    from b2t.evaluate.word_stream import WordStream

    arpa = tmp_path / "lm.arpa"
    estimate(TEXT, order=2).write(arpa)
    decoder = WordDecoder(arpa, lexicon_of(WORDS), SearchOptions(blank_penalty=0.5))
    for seed in range(6):
        logits = random_logits(14, seed)
        (expected,) = decoder.decode(logits[None], torch.ones(1, 14, dtype=torch.bool))
        for size in (1, 5):
            stream = WordStream(decoder)
            said = [stream.push(piece) for piece in logits.split(size)]
            assert stream.finish() == expected
            assert len({*said}) > 1 or not expected
    assert WordStream(decoder).finish() == ""
