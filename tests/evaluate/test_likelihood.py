import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from b2t.data.batches import eval_batches
from b2t.errors import UserError
from b2t.evaluate import likelihood
from b2t.evaluate.likelihood import (
    CausalScorer,
    ctc_log_likelihood,
    text_decoder_log_likelihood,
)
from b2t.model import BrainToText
from tests.evaluate.saved_runs import TEXTS, save_dataset, save_run, trials


def test_ctc_sums_over_every_alignment():
    frames = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    wanted = {}
    for path in itertools.product(range(4), repeat=4):
        labels = tuple(c for c, _ in itertools.groupby(path) if c)
        score = sum(float(frames[t, c]) for t, c in enumerate(path))
        wanted[labels] = math.log(math.exp(wanted.get(labels, -math.inf)) + math.exp(score))
    found = ctc_log_likelihood(frames, list(wanted))
    assert found == pytest.approx(list(wanted.values()), abs=1e-5)
    assert ctc_log_likelihood(frames, [(1, 1, 1), (1, 2, 3, 1, 2)]) == [-math.inf, -math.inf]
    assert ctc_log_likelihood(frames[:0], [(), (1,)]) == [0.0, -math.inf]


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """A model with a text decoder, and what it makes of four signals."""
    root = tmp_path_factory.mktemp("run")
    run = save_run(root / "demo", save_dataset(root / "data"))
    model = BrainToText.from_pretrained(run / "checkpoints" / "best").eval()
    batch = next(eval_batches(trials("val", 4), model.tokenizer, ["day0"], batch_size=4))
    with torch.no_grad():
        return model, batch, model(batch, weights={"generation": 1.0, "phoneme": 1.0})


def test_the_text_decoder_scores_a_batch_as_training_does(heard, monkeypatch):
    """The loss of the labels is the sum of their scores; in any company, in any grouping."""
    model, batch, output = heard
    scores = text_decoder_log_likelihood(model, output, range(4), batch.texts)
    tokens = int((batch.tokens != -100).sum())
    assert -sum(scores) / tokens == pytest.approx(float(output.losses["generation"]), rel=1e-5)
    monkeypatch.setattr(likelihood, "PAIRS", 2)
    pairs = [(row, text) for row in (2, 0) for text in (*TEXTS, "")]
    found = text_decoder_log_likelihood(model, output, *zip(*pairs, strict=True))
    for (row, text), score in zip(pairs, found, strict=True):
        alone = text_decoder_log_likelihood(model, output, [row], [text])
        assert alone == pytest.approx([score], abs=1e-4)
        assert batch.texts[row] != text or score == pytest.approx(scores[row], abs=1e-4)
    too_long = text_decoder_log_likelihood(model, output, [0, 1], ["yes", "y" * 40])
    assert too_long[1] == -math.inf and math.isfinite(too_long[0])


def test_a_causal_model_scores_a_batch_as_it_scores_one(real_data, monkeypatch):
    """Against its own logits, sentence by sentence and token by token."""
    scorer = CausalScorer(str(real_data / "tiny_llama"), "cpu")
    texts = ["Once upon a time there was a girl.", "The dog", "upon Once a there time was girl a."]
    monkeypatch.setattr(likelihood, "PAIRS", 2)
    found = scorer(texts)
    assert found[0] > found[2], "it has learnt that order matters"
    for text, score in zip(texts, found, strict=True):
        ids = torch.tensor([[1, *scorer._tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            steps = F.log_softmax(scorer._model(ids).logits.double(), -1)[0]
        wanted = sum(float(steps[i, token]) for i, token in enumerate(ids[0, 1:].tolist()))
        assert score == pytest.approx(wanted, abs=1e-3)
    assert scorer([]) == []
    with pytest.raises(UserError, match=r"tokens, the model takes"):
        scorer(["word " * 600])


def test_what_is_no_causal_model_is_one_message(tmp_path, real_data):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no causal language model could be loaded"):
            CausalScorer(str(place), "cpu")
