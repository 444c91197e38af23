import itertools
import json
import math

import numpy as np
import pytest
import torch

from b2t.data.batches import eval_batches
from b2t.data.phonemes import SIL, to_ids
from b2t.errors import UserError
from b2t.evaluate import decode_command, evaluate_command, lm_command, metrics
from b2t.evaluate.language_model import open_decoder, open_reader, read_card
from b2t.evaluate.lexicon import build_lexicon
from b2t.evaluate.likelihood import ctc_log_likelihood, text_decoder_log_likelihood
from b2t.evaluate.ngram import estimate
from b2t.evaluate.rescoring import Candidate, Rescoring, WordReader, tune_rescoring
from b2t.evaluate.surface import SurfaceForms
from b2t.evaluate.words import SearchOptions, WordDecoder, emissions
from b2t.model import BrainToText
from tests.evaluate.saved_runs import call, save_dataset, save_run, trials
from tests.evaluate.test_words import TEXT, WORDS, lexicon_of, random_logits

pytest.importorskip("flashlight.lib.text.decoder", reason="flashlight-text has no wheel here")

SURFACE = SurfaceForms(words={"i": "I"}, capital=True, endings=(".", "?"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return save_run(root / "demo", save_dataset(root / "data"))


@pytest.fixture(scope="module")
def heard(run):
    """A model, and an output of four signals whose phonemes are of few classes."""
    model = BrainToText.from_pretrained(run / "checkpoints" / "best").eval()
    batch = next(eval_batches(trials("val", 4), model.tokenizer, ["day0"], batch_size=4))
    with torch.no_grad():
        output = model(batch, weights={"phoneme": 1.0})
    frames = output.frame_mask.shape[1]
    output.phoneme_logits = torch.stack([random_logits(frames, seed) for seed in range(4)])
    return model, output


def reader(tmp_path, model, **weights):
    estimate(TEXT, 2).write(tmp_path / "lm.arpa")
    options = SearchOptions(beam_size=300, beam_threshold=1e4, log_add=False)
    decoder = WordDecoder(tmp_path / "lm.arpa", lexicon_of(WORDS), options)
    return WordReader(decoder, Rescoring(n_best=12, **weights), model, SURFACE)


def test_joint_scores_are_sums_of_parts_that_are_right(heard, tmp_path):
    """Each part by another way: alignments, our own n-grams, the decoder sentence by sentence."""
    model, output = heard
    read = reader(tmp_path, model, own=0, lm_weight=1.5, word_score=-0.5, decoder_weight=0.7)
    grams, texts = estimate(TEXT, 2), set()
    for row, found in enumerate(read.candidates(output)):
        frames = emissions(output.phoneme_logits, output.frame_mask)[row]
        labels = {h.text: h.labels for h in read.decoder.n_best(frames, 12)}
        scores = {}
        for text, ctc, lm, decoder, _ in found:
            words = text.split()
            spoken = [label for label in labels[text] if label != SIL]
            assert spoken == [p for w in words for p in to_ids(WORDS[w].split())]
            said = [
                text_decoder_log_likelihood(model, output, [row], [written])[0]
                for written in SURFACE.render(words)
            ]
            assert ctc == pytest.approx(ctc_log_likelihood(frames, [labels[text]])[0])
            assert lm == pytest.approx(grams.score(words), abs=1e-4)
            assert decoder == pytest.approx(np.logaddexp.reduce(said), abs=1e-4)
            scores[text] = ctc + 1.5 * grams.score(words) - 0.5 * len(words) + 0.7 * decoder
        assert read.read(output).joint[row] == max(scores, key=scores.__getitem__)
        texts |= {*scores}
    assert len(texts) > 10


def test_a_batch_is_read_as_its_rows_are(heard, tmp_path):
    model, output = heard
    read = reader(tmp_path, model, own=2, decoder_weight=1.0)
    together = read.read(output)
    for row in range(4):
        one = type(output)(
            quantized=output.quantized[row : row + 1],
            frame_mask=output.frame_mask[row : row + 1],
            phoneme_logits=output.phoneme_logits[row : row + 1],
        )
        alone = read.read(one)
        assert alone.first == [together.first[row]]
        assert alone.joint == [together.joint[row]]


def test_the_text_decoder_adds_its_own_hypotheses(heard, tmp_path, monkeypatch):
    """ "the" is in no lexicon here but in the dictionary, "xqzt" nowhere."""
    model, output = heard
    read = reader(tmp_path, model, own=2, decoder_weight=1.0)
    monkeypatch.setattr(
        WordReader, "_own", lambda self, output: [["see the", "a xqzt"], ["us"], [], []]
    )
    found = read.candidates(output)
    assert "see the" in [c.text for c in found[0]] and "a xqzt" not in [c.text for c in found[0]]
    added = next(c for c in found[0] if c.text == "see the")
    frames = emissions(output.phoneme_logits, output.frame_mask)[0]
    ways = [to_ids(["S", "IY", "SIL", "DH", v, "SIL"]) for v in ("AH", "IY")]
    assert added.ctc == pytest.approx(max(ctc_log_likelihood(frames, ways)))
    assert added.lm == pytest.approx(estimate(TEXT, 2).score(["see", "<unk>"]), abs=1e-4)


def test_words_of_several_pronunciations_are_spoken_in_each(tmp_path):
    estimate([["read", "a"]], 2).write(tmp_path / "lm.arpa")
    decoder = WordDecoder(
        tmp_path / "lm.arpa", build_lexicon(["read", "a"]), SearchOptions(beam_size=5)
    )
    ways = decoder.pronounce(["read", "a"])
    red, reed = ([*to_ids(["R", v, "D"]), SIL] for v in ("EH", "IY"))
    ah, ey = ([*to_ids([v]), SIL] for v in ("AH", "EY"))
    assert {*ways} == {(*r, *a) for r in (red, reed) for a in (ah, ey)}
    assert decoder.pronounce(["read"] * 40).__len__() == 16
    assert decoder.pronounce(["xqzt"]) == []
    assert decoder.pronounce([]) == [()]


def candidate(text, ctc, decoder=0.0, causal=0.0):
    return Candidate(text, ctc, -float(len(text.split())), decoder, causal)


def test_tuning_believes_the_part_that_knows():
    """The text decoder prefers what is right in every trial; the causal model what is wrong."""
    trials_ = [
        [candidate("no", -3.0, -9.0, -1.0), candidate("yes", -4.0, -2.0, -8.0)],
        [candidate("no", -3.0, -1.0, -5.0), candidate("yes please", -3.5, -8.0, -1.0)],
    ]
    targets = ["Yes.", "No."]
    start = Rescoring(lm_weight=0.5)
    weights, wer, before, tries = tune_rescoring(trials_, targets, start)
    assert (wer, before) == (0.0, 0.5) and tries == 9 * 7 * 6 * 5
    assert weights.decoder_weight > 0
    for some, target in zip(trials_, targets, strict=True):
        best = max(some, key=lambda c: c.score(weights)).text
        assert best == metrics.normalise_text(target)


def test_tuning_ends_at_the_best_of_its_grid():
    """Against a search that scores candidate by candidate."""
    generator = np.random.default_rng(5)
    texts = ["yes", "no", "yes no", "no yes no"]
    trials_ = [
        [
            candidate(text, *generator.normal(0, 3, 2))
            for text in generator.permutation(texts)[: 2 + row % 3]
        ]
        for row in range(12)
    ]
    targets = [str(generator.choice(texts)) for _ in range(12)]
    weights, wer, _, tries = tune_rescoring(trials_, targets, Rescoring())

    def rate(w):
        said = [max(some, key=lambda c: c.score(w)).text for some in trials_]
        return metrics.word_error_rate(targets, said)

    assert tries == 9 * 7 * 6, "no causal model was asked"
    assert rate(weights) == pytest.approx(wer)
    for lm, words, decoder in itertools.product((0, 1, 4, 7), (-3, 0, 2), (0, 0.5, 4)):
        other = Rescoring(lm_weight=lm, word_score=words, decoder_weight=decoder)
        assert rate(other) >= wer - 1e-9


def test_what_the_text_decoder_cannot_write_counts_only_where_it_is_asked():
    impossible = candidate("yes", -1.0, -math.inf)
    assert impossible.score(Rescoring(lm_weight=1.0)) == -2.0
    assert impossible.score(Rescoring(decoder_weight=0.5)) == -math.inf


def test_from_tuning_to_joint_words(run, tmp_path, capsys, real_data):
    data, folder = run.parent / "data", tmp_path / "lm"
    llama = real_data / "tiny_llama"
    with pytest.raises(UserError, match="--device no-such-device"):
        call(
            lm_command, data, "--out", tmp_path / "other", "--tune", run, "--rescore", llama,
            "--device", "no-such-device",
        )  # fmt: skip
    call(lm_command, data, "--out", folder, "--tune", run, "--rescore", llama, "--n-best", 5)
    assert "joint scores, 1890 settings" in capsys.readouterr().out
    card = read_card(folder)
    assert card.rescoring.n_best == 5 and card.rescoring.causal == str(llama)
    assert card.tuned.wer_joint <= card.tuned.wer + 1e-9
    card.rescoring = card.rescoring.model_copy(update={"decoder_weight": 1.0, "causal_weight": 0.5})
    card.write(folder)
    call(evaluate_command, run, "--lm", folder, "--out", tmp_path)
    assert "words by joint" in " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["wer_joint"] is not None and record["wer_joint_noise"] is not None
    assert record["language_model"]["rescoring"]["causal"] == str(llama)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    call(decode_command, run, data, "--lm", folder)
    lines = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert lines == {row["row"]: row["joint_prediction"] for row in rows}
    call(decode_command, run, data, "--lm", folder, "--no-rescoring")
    lines = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert lines == {row["row"]: row["lm_prediction"] for row in rows}


def test_a_model_without_what_was_tuned_is_told(run, tmp_path):
    folder = tmp_path / "lm"
    call(lm_command, run.parent / "data", "--out", folder)
    card = read_card(folder)
    card.rescoring = Rescoring(decoder_weight=1.0)
    card.write(folder)
    model = BrainToText.from_pretrained(run / "checkpoints" / "best")
    assert open_reader(folder, model).model is model
    model.text_decoder = None
    with pytest.raises(UserError, match=r"has not: tune them anew.*--no-rescoring"):
        open_reader(folder, model)
    assert open_reader(folder, model, rescoring=False).rescoring is None
    (folder / "surface.json").unlink()
    with pytest.raises(UserError, match=r"surface.json: not there"):
        open_reader(folder, BrainToText.from_pretrained(run / "checkpoints" / "best"))
    assert open_decoder(folder)[0] is not None
