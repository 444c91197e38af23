import torch

from b2t.quantize.frame_hash import (
    _gumbel,
    frame_gumbel,
    frame_hash,
    frame_ids,
    identity_hash,
    mix,
    signed64,
)


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
    noise = frame_gumbel(hashes, 100, 0).double()
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - 1.6449) < 0.04
    other = frame_gumbel(hashes, 100, 1).double()
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.01


def test_the_extremes_of_the_noise_are_finite():
    low, high = _gumbel(torch.tensor([0, (1 << 23) - 1])).tolist()
    assert -3 < low < -2.7 and 16 < high < 17
