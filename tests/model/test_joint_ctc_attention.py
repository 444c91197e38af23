"""Attention helped by CTC: one loss of both, and a beam that both propose to and judge."""

import pytest
import torch

from b2t.errors import UserError
from b2t.model import BrainToText
from b2t.model.configuration import BrainToTextConfig
from b2t.model.losses import token_sums
from tests.model.small_model import batch_of, build

JOINT = {"ctc_weight": 0.3}


def read(model, batch):
    encoded = model.encode_batch(batch.signal, batch.signal_mask, batch.session)
    return model.text_memory(encoded)


def test_the_loss_is_the_weighted_sum_and_both_learn():
    model = build(text_decoder=JOINT, pad_token_id=0).train()
    batch = batch_of([60, 54])
    output = model(batch, weights={"generation": 1.0})
    memory, mask = read(model, batch)
    attended = token_sums(model.text_decoder(memory, mask, batch.tokens), batch.tokens)
    heard = model.text_decoder.ctc_sums(memory, mask, batch.tokens)
    total = 0.7 * attended.cross_entropy + 0.3 * heard.negative_log_likelihood
    torch.testing.assert_close(output.loss, total / batch.counts()["tokens"])
    output.loss.backward()
    assert model.text_decoder.ctc.weight.grad.abs().sum() > 0
    assert model.text_decoder.seq2seq.get_input_embeddings().weight.grad.abs().sum() > 0


def test_a_beam_takes_what_both_together_hold_likeliest():
    model = build(text_decoder=JOINT, pad_token_id=0).eval()
    decoder, batch = model.text_decoder, batch_of([60, 54])
    memory, mask = read(model, batch)
    with torch.no_grad():
        decoder.ctc.weight.mul_(8)
        said = decoder.generate(memory, mask, num_beams=6, num_return_sequences=6)
        assert said[:, 0].tolist() == [decoder.seq2seq.config.decoder_start_token_id] * 12
        proposed = decoder._proposed(memory, mask, {"num_beams": 6})
        for row in range(2):
            one = memory[row : row + 1], mask[row : row + 1]
            scores = {}
            for text in proposed[row]:
                tokens = torch.tensor([text])
                attended = -token_sums(decoder(*one, tokens), tokens).cross_entropy
                found = decoder.ctc_sums(*one, tokens)
                heard = torch.inf if int(found.too_short) else found.negative_log_likelihood
                scores[text] = float(0.7 * attended - 0.3 * heard)
            ranked = sorted(scores, key=lambda text: -scores[text])[:6]
            for place, text in enumerate(ranked):
                found = said[6 * row + place].tolist()
                assert found[1 : len(text) + 1] == list(text) and not any(found[len(text) + 1 :])
    greedy = decoder.generate(memory, mask)
    assert greedy.shape[0] == 2, "without a beam attention writes alone"


def test_a_row_alone_is_read_the_same_and_saved(tmp_path):
    model = build(text_decoder=JOINT, pad_token_id=0).eval()
    batch = batch_of([60, 54])
    together = model.generate(batch, num_beams=4)
    for row, length in enumerate((60, 54)):
        alone = model.generate(
            batch.signal[row : row + 1, :length], session=batch.session[row : row + 1], num_beams=4
        )
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()
    model.save_pretrained(tmp_path)
    loaded = BrainToText.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.generate(batch, num_beams=4), together)
    assert loaded.lays_tokens and loaded.predicts_tokens


def test_it_is_for_attention():
    with pytest.raises((UserError, ValueError), match="ctc_weight is for kind seq2seq"):
        BrainToTextConfig(text_decoder={"kind": "causal_lm", "ctc_weight": 0.3})
