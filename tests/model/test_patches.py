import pytest
import torch

from b2t.model.patches import from_patches, num_patches, patch_mask, to_patches

GEOMETRIES = [(1, 1), (4, 4), (5, 3), (7, 2), (14, 4), (6, 5)]


@pytest.mark.parametrize(("size", "stride"), GEOMETRIES)
@pytest.mark.parametrize("bins", [1, 3, 14, 31])
def test_patches_cover_every_bin_and_come_back(size, stride, bins):
    signal = torch.randn(2, bins, 3)
    mask = torch.ones(2, bins, dtype=torch.bool)
    patches = to_patches(signal, size, stride)
    assert patches.shape == (2, num_patches(bins, size, stride), size * 3)
    for p in range(patches.shape[1]):
        for k in range(size):
            expected = signal[:, p * stride + k] if p * stride + k < bins else torch.zeros(2, 3)
            assert torch.equal(patches[:, p, 3 * k : 3 * k + 3], expected)
    frames = patch_mask(mask, size, stride)
    assert frames.all()
    torch.testing.assert_close(from_patches(patches, frames, bins, size, stride), signal)


@pytest.mark.parametrize(("size", "stride"), GEOMETRIES)
def test_mask_of_a_padded_trial_is_that_of_the_trial_alone(size, stride):
    for bins in range(0, 24):
        mask = torch.zeros(1, 29, dtype=torch.bool)
        mask[:, :bins] = True
        frames = patch_mask(mask, size, stride)[0]
        alone = num_patches(bins, size, stride) if bins else 0
        assert int(frames.sum()) == alone
        assert frames[:alone].all()


@pytest.mark.parametrize(("size", "stride"), GEOMETRIES)
def test_overlapping_patches_are_averaged_over_the_real_ones(size, stride):
    bins, generator = 23, torch.Generator().manual_seed(0)
    count = num_patches(bins, size, stride)
    patches = torch.randn(2, count, size * 2, generator=generator)
    mask = torch.rand(2, count, generator=generator) < 0.6
    patches[~mask] = float("nan")
    out = from_patches(patches, mask, bins, size, stride)
    for row in range(2):
        for time in range(bins):
            covering = [
                patches[row, p, 2 * (time - p * stride) : 2 * (time - p * stride) + 2]
                for p in range(count)
                if mask[row, p] and 0 <= time - p * stride < size
            ]
            expected = torch.stack(covering).mean(0) if covering else torch.zeros(2)
            torch.testing.assert_close(out[row, time], expected)


def test_every_real_bin_lies_in_a_real_patch_whatever_the_mask():
    generator = torch.Generator().manual_seed(1)
    for size, stride in GEOMETRIES:
        mask = torch.rand(8, 37, generator=generator) < 0.3
        frames = patch_mask(mask, size, stride)
        for row, time in mask.nonzero().tolist():
            covering = [p for p in range(frames.shape[1]) if p * stride <= time < p * stride + size]
            assert any(bool(frames[row, p]) for p in covering)
