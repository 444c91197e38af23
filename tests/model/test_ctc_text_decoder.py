"""A text decoder of kind ctc: its loss and search against all paths, rows alone and together."""

import itertools

import pytest
import torch

from b2t.errors import UserError
from b2t.evaluate.decode import collapse_ctc
from b2t.model import BrainToText
from b2t.model.configuration import BrainToTextConfig
from b2t.model.ctc_search import best_path, prefix_beam, spoken_tokens
from b2t.model.ctc_text_decoder import CtcTextDecoder
from b2t.model.options import SavedTextDecoderOptions
from b2t.model.phoneme_memory import PhonemeMemory, as_frames, labelled_phonemes
from b2t.model.text_models import SpecialTokens
from tests.model.small_model import batch_of, build, config

LAYS = {"kind": "ctc", "memory": "posteriors", "memory_depth": 0, "phoneme_errors": 0.0}
BLANK, END = 2, 1


def every_reading(frames):
    """Probability of each label sequence, summed over all paths one by one: [P, V] → dict."""
    found = {}
    for path in itertools.product(range(frames.shape[1]), repeat=len(frames)):
        merged = [label for label, _ in itertools.groupby(path)]
        labels = tuple(label for label in merged if label != BLANK)
        chance = frames[range(len(path)), path].double().sum().exp().item()
        found[labels] = found.get(labels, 0.0) + chance
    return found


def decoder(seed=0, vocabulary=4, **options):
    torch.manual_seed(seed)
    sizes = SavedTextDecoderOptions(
        kind="ctc", dim=8, depth=1, ffn_dim=16, kernel_size=3, dropout=0.0, max_tokens=9, **options
    )
    tokens = SpecialTokens(start=0, end=END, padding=BLANK)
    return CtcTextDecoder(5, sizes, tokens=tokens, vocabulary=vocabulary).eval()


@pytest.fixture
def some():
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(3, 5, 5, generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 4 + [False], [False, True, True, False, True]])
    return latents, mask


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_what_all_paths_say(seed):
    torch.manual_seed(seed)
    frames = (2 * torch.randn(5, 4)).log_softmax(-1)
    expected = sorted(every_reading(frames).items(), key=lambda item: -item[1])
    found = prefix_beam(frames, 10_000, BLANK, per_frame=4)
    assert [labels for labels, _ in found[:20]] == [labels for labels, _ in expected[:20]]
    chances = torch.tensor([score for _, score in found]).double().exp()
    torch.testing.assert_close(
        chances[:20], torch.tensor([chance for _, chance in expected[:20]]).double()
    )
    assert chances.sum() == pytest.approx(1.0)


def test_a_beam_sees_more_than_the_best_path():
    """The likeliest path is all blanks; the label is likelier over its three paths together."""
    frames = torch.tensor([[0.4, 0.0, 0.6, 0.0]] * 2).clamp(min=1e-9).log()
    assert best_path(frames[None], torch.ones(1, 2, dtype=torch.bool), BLANK) == [[]]
    (labels, score), *_ = prefix_beam(frames, 4, BLANK)
    assert labels == (0,) and score == pytest.approx(torch.tensor(0.64).log().item())
    assert prefix_beam(frames[:0], 4, BLANK) == [((), 0.0)]


def test_the_loss_is_that_of_all_paths_and_the_end_is_not_said(some):
    latents, mask = some
    model = decoder()
    tokens = torch.tensor([[3, 0, END], [3, END, -100], [0, 0, END]])
    logits, found = model.score(latents, mask, tokens)
    expected = []
    for row, labels in enumerate([(3, 0), (3,), (0, 0)]):
        frames = logits[row, mask[row]].log_softmax(-1)
        expected.append(-torch.tensor(every_reading(frames)[labels]).log())
    torch.testing.assert_close(found.negative_log_likelihood, torch.stack(expected).sum())
    assert int(found.rows) == 3 and int(found.too_short) == 0
    likely = model.log_likelihood(latents, mask, tokens)
    torch.testing.assert_close(-likely, torch.stack(expected))


def test_frames_that_are_too_few_are_counted_and_impossible(some):
    latents, mask = some
    model = decoder()
    mask[0, 1:] = False
    tokens = torch.tensor([[3, 0, END], [3, END, -100], [-100, -100, -100]])
    found = model.score(latents, mask, tokens)[1]
    assert (int(found.rows), int(found.too_short)) == (1, 1)
    assert found.negative_log_likelihood.isfinite()
    assert model.log_likelihood(latents, mask, tokens)[0] == -torch.inf


def test_a_row_alone_is_the_same_row(some):
    latents, mask = some
    model = decoder()
    changed = torch.where(mask[..., None], latents, torch.tensor(7.0))
    together = model(changed, mask)
    for row, length in ((0, 5), (1, 4)):
        alone = model(latents[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0])
    beam = model.generate(changed, mask, num_beams=8)
    for row, length in ((0, 5), (1, 4)):
        single = model.generate(
            latents[row : row + 1, :length], mask[row : row + 1, :length], num_beams=8
        )
        assert beam[row, : single.shape[1]].tolist() == single[0].tolist()
        assert set(beam[row, single.shape[1] :].tolist()) <= {BLANK}


def test_what_is_generated_begins_ends_and_is_cut(some):
    latents, mask = some
    model = decoder(seed=2)
    greedy = model.generate(latents, mask)
    read = best_path(model(latents, mask), mask, BLANK)
    for row, labels in zip(greedy.tolist(), read, strict=True):
        assert row[: len(labels) + 2] == [0, *labels, END]
    assert model.generate(latents, mask, max_new_tokens=2).shape[1] <= 3
    several = model.generate(latents, mask, num_beams=4, num_return_sequences=3)
    assert len(several) == 9
    best = model.generate(latents, mask, num_beams=4)
    for row in range(3):
        kept = [token for token in best[row].tolist() if token != BLANK]
        assert [token for token in several[3 * row].tolist() if token != BLANK] == kept
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(latents, mask, num_return_sequences=2)
    with pytest.raises(ValueError, match="samples none"):
        model.generate(latents, mask, do_sample=True)


def test_labels_without_their_end():
    labels, lengths = spoken_tokens(torch.tensor([[4, 5, 1], [6, 1, -100], [-100, -100, -100]]))
    assert lengths.tolist() == [2, 1, 0] and labels.min() >= 0


def test_labels_are_laid_on_frames_as_they_are_heard():
    torch.manual_seed(0)
    said = torch.arange(200) % 40 + 1
    phonemes, mask = labelled_phonemes(said.repeat(8, 1), torch.tensor([200] * 7 + [90]))
    frames, real = as_frames(phonemes, mask)
    heard = collapse_ctc(frames, real)
    assert heard == [said.tolist()] * 7 + [said[:90].tolist()]
    assert not frames[~real].any()
    torch.testing.assert_close(frames.sum(-1)[real], torch.ones(int(real.sum())))
    assert real.sum() / mask.sum() == pytest.approx(1.6, rel=0.05)
    assert real[:, 1:].le(real[:, :-1]).all(), "real frames stand together, at the front"


def test_posteriors_are_those_of_every_frame():
    memory = PhonemeMemory(8, 0, 2, 0.0, errors=0.0, frames=True).eval()
    logits = torch.randn(2, 6, 41)
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    read, kept = memory.of_logits(logits, mask)
    assert torch.equal(kept, mask) and read.shape == (2, 6, 8)
    alone, _ = memory.of_logits(logits[1:, :3], mask[1:, :3])
    torch.testing.assert_close(read[1, :3], alone[0])
    changed = logits.clone()
    changed[0, 2, 5] += 1
    assert not torch.allclose(memory.of_logits(changed, mask)[0][0, 2], read[0, 2])


def test_the_model_learns_to_write_and_is_saved(tmp_path):
    model = build(text_decoder={"kind": "ctc", "dim": 32, "kernel_size": 3}, pad_token_id=0).train()
    model.freeze(["adapter", "encoder", "quantizer", "signal_decoder", "phoneme_head"])
    batch = batch_of([60, 54])
    optimizer = torch.optim.Adam(model.text_decoder.parameters(), lr=0.02)
    for _ in range(80):
        output = model(batch, weights={"generation": 1.0})
        optimizer.zero_grad(), output.loss.backward(), optimizer.step()
    assert {"text_rows", "text_rows_too_short"} <= output.metrics.keys()
    model.eval()
    said = model.generate(batch, num_beams=4)
    for row, tokens in zip(said.tolist(), batch.tokens.tolist(), strict=True):
        wanted = [token for token in tokens if token >= 0]
        assert row[1 : len(wanted) + 1] == wanted
    model.save_pretrained(tmp_path)
    loaded = BrainToText.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.generate(batch), model.generate(batch))
    assert not loaded.predicts_tokens and not loaded.reads_phonemes


def test_spelling_is_learnt_from_labels_without_a_signal():
    model = build(text_decoder=LAYS).train()
    batch = batch_of([60, 54])
    batch.signal.fill_(torch.nan)
    output = model(batch, weights={"generation": 1.0}, text_from_labels=True)
    output.loss.backward()
    touched = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert output.loss.isfinite() and touched == {"text_decoder"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "x"}, "checkpoint is for decoders"),
        ({"tuning": "lora"}, "tuning lora is for decoders"),
        ({"label_smoothing": 0.1}, "label_smoothing is for decoders"),
        ({"kernel_size": 4}, "kernel_size 4 must be odd"),
    ],
)
def test_what_it_has_no_use_for_is_refused(change, message):
    with pytest.raises((UserError, ValueError), match=message):
        BrainToTextConfig(text_decoder={"kind": "ctc", **change})
    assert config(text_decoder=LAYS).text_decoder["config"] is None
