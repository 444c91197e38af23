import itertools
import math

import pytest
import torch

from b2t.model.losses import ctc_sums, reconstruction_sums, token_sums, with_slips


def collapse(path):
    """What CTC reads from a path: repeats merged, then blanks removed."""
    merged = [label for label, _ in itertools.groupby(path)]
    return [label for label in merged if label != 0]


def brute_force_nll(logits, phonemes):
    """−log Σ over all paths, in float64."""
    logp = logits.double().log_softmax(-1)
    total = sum(
        math.exp(sum(float(logp[t, label]) for t, label in enumerate(path)))
        for path in itertools.product(range(logits.shape[1]), repeat=logits.shape[0])
        if collapse(path) == phonemes
    )
    return -math.log(total) if total else math.inf


def rows(logits, labels, masks):
    lengths = torch.tensor([len(label) for label in labels])
    padded = torch.zeros(len(labels), max(map(len, labels)), dtype=torch.int64)
    for row, label in zip(padded, labels, strict=True):
        row[: len(label)] = torch.tensor(label, dtype=torch.int64)
    return ctc_sums(logits, masks, padded, lengths)


def test_ctc_equals_the_sum_over_all_paths_of_the_real_frames():
    torch.manual_seed(0)
    logits = torch.randn(5, 6, 3)
    logits[:, 5] = float("nan")
    masks = torch.tensor(
        [
            [1, 1, 1, 1, 1, 0],
            [1, 1, 1, 0, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 0, 0],
        ]
    ).bool()
    labels = [[1, 2, 1], [1, 1], [2], [], [2, 2]]
    logits = logits.requires_grad_()
    total = rows(logits, labels, masks)
    expected = sum(brute_force_nll(logits[i].detach()[masks[i]], labels[i]) for i in range(3))
    assert abs(total.negative_log_likelihood.item() - expected) < 1e-4
    assert int(total.rows) == 3
    assert int(total.too_short) == 1
    total.negative_log_likelihood.backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[~masks].abs().max() == 0
    assert logits.grad[3:].abs().max() == 0
    assert logits.grad[2][masks[2]].abs().min() > 0


def test_a_row_that_fits_exactly_counts_and_one_frame_less_does_not():
    logits = torch.randn(1, 5, 41)
    label = [[7, 7, 3, 3]]
    mask = torch.ones(1, 6, dtype=torch.bool)
    six = rows(torch.randn(1, 6, 41), label, mask)
    five = rows(logits, label, mask[:, :5])
    assert (int(six.rows), int(six.too_short)) == (1, 0)
    assert (int(five.rows), int(five.too_short)) == (0, 1)
    assert math.isfinite(float(six.negative_log_likelihood))
    assert float(five.negative_log_likelihood) == 0.0


def test_padding_of_the_labels_is_no_repetition():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 3)
    masks = torch.tensor([[True] * 3, [True, False, False]])
    total = rows(logits, [[1, 2, 1], [2]], masks)
    assert (int(total.rows), int(total.too_short)) == (2, 0)
    expected = brute_force_nll(logits[0], [1, 2, 1]) + brute_force_nll(logits[1, :1], [2])
    assert abs(total.negative_log_likelihood.item() - expected) < 1e-4


def test_no_phonemes_and_no_frames_give_zero_with_a_graph():
    logits = torch.randn(2, 4, 41, requires_grad=True)
    mask = torch.tensor([[True] * 4, [False] * 4])
    none = ctc_sums(logits, mask, torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2).long())
    none.negative_log_likelihood.backward()
    assert none.negative_log_likelihood.item() == 0.0
    assert logits.grad.abs().max() == 0
    phonemes = torch.tensor([[1, 2], [1, 2]])
    some = ctc_sums(logits, mask, phonemes, torch.tensor([2, 2]))
    assert (int(some.rows), int(some.too_short)) == (1, 1)
    assert torch.isfinite(some.negative_log_likelihood)


def test_reconstruction_sums_equal_a_float64_loop_and_ignore_what_is_masked():
    torch.manual_seed(0)
    prediction, target = torch.randn(3, 9, 4), 10 + torch.randn(3, 9, 4)
    mask = torch.rand(3, 9) < 0.5
    error = power = 0.0
    for row, time in mask.nonzero().tolist():
        difference = prediction[row, time].double() - target[row, time].double()
        error += float(difference.square().sum())
        power += float(target[row, time].double().square().sum())
    prediction[~mask] = float("nan")
    target[~mask] = float("inf")
    prediction.requires_grad_()
    total = reconstruction_sums(prediction, target, mask)
    assert abs(total.squared_error.item() - error) < 1e-3 * error
    assert abs(float(total.power) - power) < 1e-3 * power
    total.squared_error.backward()
    assert prediction.grad[~mask].abs().max() == 0
    assert torch.isfinite(prediction.grad).all()


def test_half_precision_sums_do_not_overflow():
    prediction = torch.full((1, 2000, 64), 30.0, dtype=torch.float16)
    total = reconstruction_sums(
        prediction, torch.zeros_like(prediction), torch.ones(1, 2000).bool()
    )
    assert float(total.squared_error) == 900.0 * 2000 * 64


def test_token_sums_count_labels_only():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 7, requires_grad=True)
    tokens = torch.tensor([[1, 2, -100, -100], [-100] * 4, [6, 5, 4, 3]])
    logp = logits.detach().double().log_softmax(-1)
    expected = -sum(
        float(logp[row, place, tokens[row, place]])
        for row, place in (tokens >= 0).nonzero().tolist()
    )
    total = token_sums(logits, tokens)
    assert abs(total.cross_entropy.item() - expected) < 1e-4
    assert int(total.correct) == int((logits.argmax(-1) == tokens).sum())
    total.cross_entropy.backward()
    assert logits.grad[1].abs().max() == 0
    assert token_sums(logits, torch.full((3, 4), -100)).cross_entropy.item() == 0.0


def test_smoothed_targets_are_a_mixture_with_all_tokens():
    logits, tokens = torch.randn(2, 3, 5), torch.tensor([[4, 0, -100], [2, -100, -100]])
    logs = logits.double().log_softmax(-1)
    expected = sum(
        -0.7 * logs[row, place, token] - 0.3 * logs[row, place].mean()
        for row, place, token in ((0, 0, 4), (0, 1, 0), (1, 0, 2))
    )
    found = token_sums(logits, tokens, smoothing=0.3)
    assert float(found.cross_entropy) == pytest.approx(float(expected), rel=1e-5)
    assert int(found.correct) == int(token_sums(logits, tokens).correct)


def test_slips_come_as_often_as_asked_and_leave_what_is_no_token():
    torch.manual_seed(0)
    tokens = torch.full((100, 50), 7)
    tokens[:, 40:] = -100
    shown = with_slips(tokens, 0.3, 20)
    assert (shown[:, 40:] == -100).all() and int(shown[:, :40].max()) == 19
    # One random token in twenty is the true one.
    assert float((shown[:, :40] != 7).float().mean()) == pytest.approx(0.3 * 0.95, abs=0.03)
