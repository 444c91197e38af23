import torch

from b2t.quantize.frame_hash import (
    code_keys,
    frame_hash,
    frame_ids,
    identity_hash,
    signed64,
)
from b2t_kernels.gumbel import from_bits, mix, noise


def splitmix_finalizer(value):
    value &= 2**64 - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


def test_mix_is_the_finalizer_of_splitmix64():
    values = [0, 1, -1, 2**63 - 1, -(2**63), 0x9E3779B97F4A7C15 - 2**64, 12345678901234567]
    found = mix(torch.tensor(values)).tolist()
    assert found == [signed64(splitmix_finalizer(value)) for value in values]


def test_a_hash_belongs_to_the_frame_the_seed_and_the_step():
    x = torch.randn(10_000, 3)
    hashes = frame_hash(x, 1, 2)
    assert hashes.unique().numel() == 10_000
    assert torch.equal(frame_hash(x.flip(0), 1, 2).flip(0), hashes)
    assert torch.equal(frame_hash(x[37:41], 1, 2), hashes[37:41])
    for other in (frame_hash(x, 2, 2), frame_hash(x, 1, 3)):
        assert not (other == hashes).any()
    assert abs(float((hashes < 0).double().mean()) - 0.5) < 0.02


def test_identities_are_those_of_trial_and_place():
    trials = mix(torch.arange(200))
    ids = frame_ids(trials, 50)
    assert ids.shape == (200, 50) and ids.unique().numel() == 10_000
    assert torch.equal(frame_ids(trials[7:9], 50), ids[7:9])
    assert torch.equal(frame_ids(trials, 30), ids[:, :30])  # padding changes nothing
    flat = ids.flatten()
    hashes = identity_hash(flat, 1, 2)
    assert hashes.unique().numel() == 10_000
    assert abs(float((hashes < 0).double().mean()) - 0.5) < 0.02
    drawn = set(hashes.argsort()[:500].tolist())
    for other in (identity_hash(flat, 2, 2), identity_hash(flat, 1, 3)):
        assert len(drawn & set(other.argsort()[:500].tolist())) < 60  # 25 by chance


def test_gumbel_noise_has_its_moments_and_differs_by_layer():
    hashes = frame_hash(torch.randn(2000, 3), 0, 0)
    cpu = torch.device("cpu")
    first = noise(hashes, code_keys(100, 0, cpu)).double()
    assert abs(first.mean() - 0.5772) < 0.02 and abs(first.var() - 1.6449) < 0.04
    other = noise(hashes, code_keys(100, 1, cpu)).double()
    assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 0.01


def test_noise_is_that_of_its_pair_alone():
    """Blocks of rows are an economy: any part of the rows gives that part of the noise."""
    keys = frame_hash(torch.randn(50, 3), 0, 0)
    codes = code_keys(3000, 2, torch.device("cpu"))
    whole = noise(keys, codes)
    assert torch.equal(noise(keys[40:], codes), whole[40:])
    assert torch.equal(noise(keys, codes[7:9]), whole[:, 7:9])
    bits = torch.tensor(splitmix_finalizer(int(keys[5] ^ codes[11])) >> 41)
    assert whole[5, 11] == -torch.log(-torch.log((bits.float() + 0.5) / 2**23))


def test_the_extremes_of_the_noise_are_finite():
    low, high = from_bits(torch.tensor([0, (1 << 23) - 1])).tolist()
    assert -3 < low < -2.7 and 16 < high < 17
