"""Codes that move to what all layers together leave over (`joint_update`)."""

import pytest
import torch

from b2t.errors import UserError
from tests.quantize.small_quantizer import latents, started


def squared_error(quantizer, x, codes):
    """Mean ‖x − Σ codes‖² per frame for codes [N, Q] that stay as they are, in float64."""
    books = quantizer.codebooks.embed.double()
    total = sum(books[q][codes[:, q]] for q in range(codes.shape[1]))
    return float((x.flatten(0, 1).double() - total).square().sum(1).mean())


def test_sums_are_code_plus_what_the_last_layer_leaves():
    x = latents(6, offset=3.0)
    quantizer = started(joint_update=True, quantize_dropout=False)
    out = quantizer(x)
    books = quantizer.codebooks.embed
    wanted = torch.zeros(books.shape, dtype=torch.float64)
    for frame, codes in zip(x.flatten(0, 1), out.codes.flatten(0, 1), strict=True):
        chosen = [books[q, code].double() for q, code in enumerate(codes)]
        left = frame.double() - torch.stack(chosen).sum(0)
        for q, code in enumerate(codes):
            wanted[q, code] += chosen[q] + left
    torch.testing.assert_close(out.stats.sums.double(), wanted, atol=1e-3, rtol=1e-5)


def test_one_layer_moves_as_without_it():
    results = []
    for joint in (False, True):
        quantizer = started(joint_update=joint, num_quantizers=1)
        for seed in range(4):
            quantizer.update(quantizer(latents(seed=seed)).stats)
        results.append(quantizer.codebooks.embed)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beam", [1, 4])
def test_for_the_same_codes_it_comes_near_the_least_squares_of_all_books(beam):
    """Codebooks that fit given codes best solve a linear problem; the layers' own means do not."""
    x, left = latents(40), {}
    for joint in (False, True):
        quantizer = started(
            x, joint_update=joint, decay=0.9, revival=None, beam_size=beam, num_quantizers=3
        )
        codes = quantizer(x).codes.flatten(0, 1)
        layers = quantizer._layers(quantizer.codebooks.embed)
        for _ in range(200):
            walk = layers.walk(x.flatten(0, 1), sums=True, codes=codes)
            books = quantizer.codebooks
            books.move_averages(walk.counts, walk.sums, 0.9, 1e-5, cosine=False)
        left[joint] = squared_error(quantizer, x, codes)
    K = quantizer.codebook_size
    chosen = torch.nn.functional.one_hot(codes + K * torch.arange(3), 3 * K).sum(1).double()
    frames = x.flatten(0, 1).double()
    best = frames - chosen @ torch.linalg.pinv(chosen) @ frames
    least = float(best.square().sum(1).mean())
    assert least <= left[True] < least * 1.001
    assert left[False] > least * 1.02


def test_it_has_no_meaning_for_directions():
    with pytest.raises(UserError, match="joint_update"):
        started(joint_update=True, use_cosine_sim=True)
