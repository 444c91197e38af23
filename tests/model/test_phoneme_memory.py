"""A text decoder that reads phonemes: what it reads, and that it can be taught without signals."""

from dataclasses import replace

import pytest
import torch

from b2t.errors import UserError
from b2t.evaluate.decode import collapse_ctc
from b2t.model import BrainToText
from b2t.model.phoneme_memory import (
    PhonemeMemory,
    labelled_phonemes,
    soft_phonemes,
    with_errors,
)
from tests.model.small_model import batch_of, build

READS = {"memory": "phonemes", "memory_depth": 1, "phoneme_errors": 0.0}


def spoken(rows=5, frames=40, seed=0):
    """Logits of few classes, so that runs and blanks come about, and masks of every kind."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, frames, 41, generator=generator)
    logits[..., 4:] -= 20
    mask = torch.ones(rows, frames, dtype=torch.bool)
    mask[1, 25:] = False
    mask[2, :7] = False
    mask[3] = False
    logits[4, :, 0] += 50  # nothing but blanks
    return logits, mask


def test_phonemes_are_those_of_greedy_decoding_with_the_mean_of_their_posteriors():
    logits, mask = spoken()
    phonemes, real = soft_phonemes(logits, mask)
    assert [row[keep].argmax(-1).tolist() for row, keep in zip(phonemes, real, strict=True)] == (
        collapse_ctc(logits, mask)
    )
    assert not phonemes[~real].any() and real[:3].any(1).all() and not real[3:].any()
    posteriors, best = logits.double().softmax(-1), logits.argmax(-1)
    for row in range(3):
        expected, frame = [], 0
        frames = mask[row].nonzero().flatten().tolist()
        while frame < len(frames):
            run = [frames[frame]]
            while frame + len(run) < len(frames) and (
                best[row, frames[frame + len(run)]] == best[row, run[0]]
            ):
                run.append(frames[frame + len(run)])
            frame += len(run)
            if best[row, run[0]] != 0:
                expected.append(posteriors[row, run].mean(0))
        torch.testing.assert_close(phonemes[row][real[row]].double(), torch.stack(expected))


def test_room_that_is_given_changes_nothing_but_the_padding():
    logits, mask = spoken()
    phonemes, real = soft_phonemes(logits, mask)
    padded, kept = soft_phonemes(logits, mask, room=logits.shape[1])
    longest = real.shape[1]
    assert padded.shape[1] == kept.shape[1] == logits.shape[1] > longest
    assert torch.equal(padded[:, :longest], phonemes) and torch.equal(kept[:, :longest], real)
    assert not padded[:, longest:].any() and not kept[:, longest:].any()


def test_labels_are_certain_phonemes():
    phonemes, mask = labelled_phonemes(torch.tensor([[3, 40, 7], [5, 0, 0]]), torch.tensor([3, 1]))
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    assert phonemes.argmax(-1)[mask].tolist() == [3, 40, 7, 5]
    assert phonemes.sum(-1).tolist() == [[1, 1, 1], [1, 0, 0]]
    nothing, mask = labelled_phonemes(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2))
    assert nothing.shape == (2, 1, 41) and not mask.any()


def test_errors_come_as_often_as_asked_and_leave_the_order():
    torch.manual_seed(0)
    said = torch.arange(400) % 40 + 1
    phonemes, mask = labelled_phonemes(said.repeat(50, 1), torch.full((50,), 400))
    mask[1, 300:] = False
    found, kept = with_errors(phonemes, mask, 0.2)
    assert not found[~kept].any()
    mixed = (found.max(-1).values < 1) & kept
    assert mixed.sum() / mask.sum() == pytest.approx(0.1 * 39 / 40, rel=0.1)
    lengths = kept.sum(1).float()
    assert lengths[0] + lengths[2:].sum() == pytest.approx(49 * 400, rel=0.02)
    assert lengths[1] == pytest.approx(300, rel=0.1), "as many are added as dropped"
    row = found[0][kept[0]].argmax(-1) - 1
    steps = (row[1:] - row[:-1]) % 40
    assert (steps == 1).float().mean() > 0.6, "what was not touched follows in order"
    assert (steps == 2).float().mean() > 0.03, "some are dropped"
    same, kept = with_errors(phonemes, mask, 0.0)
    assert torch.equal(same[:, :400], phonemes * mask[..., None]) and kept.sum() == mask.sum()


def test_only_training_makes_errors():
    memory = PhonemeMemory(8, 1, 2, 0.0, errors=0.5)
    phonemes, mask = labelled_phonemes(torch.randint(1, 41, (2, 30)), torch.tensor([30, 20]))
    first, kept = memory.eval()(phonemes, mask)
    assert torch.equal(kept, mask) and torch.equal(first, memory(phonemes, mask)[0])
    assert memory.train()(phonemes, mask)[1].shape[1] > 30


def test_text_from_labels_needs_no_signal():
    model = build(text_decoder=READS).train()
    batch = batch_of([40, 33])
    blind = replace(batch, signal=torch.full_like(batch.signal, torch.nan))
    found = model(blind, weights={"generation": 1.0}, text_from_labels=True)
    beside = model(batch, weights={"generation": 1.0, "phoneme": 0.5}, text_from_labels=True)
    torch.testing.assert_close(found.losses["generation"], beside.losses["generation"])
    assert found.stats is None and beside.stats is not None
    found.loss.backward()
    touched = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"text_decoder"}
    heard = model(batch, weights={"generation": 1.0})
    assert not torch.allclose(heard.loss, found.loss)


def test_text_depends_on_the_phonemes_heard_alone():
    model = build(text_decoder=READS).eval()
    batch = batch_of([40, 33, 20])
    expected = model.generate(batch, max_new_tokens=6)
    logits = model(batch, weights={"phoneme": 1.0})
    memory, mask = model.text_decoder.phonemes(
        *soft_phonemes(logits.phoneme_logits, logits.frame_mask)
    )
    assert torch.equal(model.text_decoder.generate(memory, mask, max_new_tokens=6), expected)
    for row in range(3):
        alone = batch_of([40, 33, 20])
        short = [40, 33, 20][row]
        single = model.generate(
            alone.signal[row : row + 1, :short], session=alone.session[row : row + 1],
            max_new_tokens=6,
        )  # fmt: skip
        assert single[0].tolist() == expected[row][: single.shape[1]].tolist()


def test_a_saved_model_reads_the_same(tmp_path):
    model = build(text_decoder=READS).eval()
    model.save_pretrained(tmp_path)
    loaded = BrainToText.from_pretrained(tmp_path).eval()
    batch = batch_of([40, 33])
    left, right = (m(batch, weights={"generation": 1.0}).text_logits for m in (model, loaded))
    assert torch.equal(left, right) and loaded.reads_phonemes


def test_phonemes_cannot_be_read_without_their_head():
    with pytest.raises(UserError, match=r"memory=phonemes, but this model has no phoneme head"):
        build(text_decoder=READS, phoneme_head={"enabled": False})


def test_training_is_shown_mistakes_and_judged_by_the_truth():
    """Nearly every token shown is random; the first follows the start and is read as before."""
    text = {**READS, "dropout": 0.0}
    plain, slips = build(text_decoder=text), build(text_decoder={**text, "token_errors": 0.99})
    slips.load_state_dict(plain.state_dict())
    slips.freeze(["adapter", "encoder", "quantizer", "signal_decoder", "phoneme_head"])
    batch, weights = batch_of([40, 24, 33]), {"generation": 1.0}
    truth = plain.eval()(batch, weights=weights)
    trained = slips.train()(batch, weights=weights)
    evaluated = slips.eval()(batch, weights=weights)
    torch.testing.assert_close(evaluated.loss, truth.loss)
    torch.testing.assert_close(trained.text_logits[:, 0], truth.text_logits[:, 0])
    assert not torch.allclose(trained.text_logits[:, 1:], truth.text_logits[:, 1:])
    tokens = batch.tokens
    expected = torch.nn.functional.cross_entropy(
        trained.text_logits.flatten(0, 1), tokens.flatten(), ignore_index=-100
    )
    torch.testing.assert_close(trained.loss, expected)
