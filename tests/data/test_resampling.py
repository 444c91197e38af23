"""Resampled stretches of a recording: their length, their neighbours, and what lies around them."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import resample_poly

from b2t.data.batches.batch import Example, collate
from b2t.data.remarks import Remarks
from b2t.data.sources.base import SourceOptions, resampled
from b2t.data.sources.cutting import windows
from b2t.data.sources.recording import CutRecording, Recording

RATE = 200.0


def slow_waves(samples: int) -> np.ndarray:
    """Two sines far below any Nyquist frequency that is tried, [samples, 2]."""
    seconds = np.arange(samples) / RATE
    return np.stack([np.sin(2 * np.pi * 3 * seconds), np.cos(2 * np.pi * 7 * seconds)], 1)


@settings(deadline=None, max_examples=40)
@given(
    wanted=st.sampled_from([50.0, 64.0, 100.0, 128.0, 250.0, 500.0]),
    start=st.integers(0, 700),
    length=st.integers(20, 300),
)
def test_a_stretch_has_its_length_and_the_values_of_the_wave(wanted, start, length):
    whole = slow_waves(1000)
    stop = min(start + length, 1000)
    found = resampled(lambda a, b: whole[a:b], start, stop, (0, 1000), (RATE, wanted))
    assert len(found) == max(1, round((stop - start) * wanted / RATE))
    times = start / RATE + np.arange(len(found)) / wanted
    expected = np.stack([np.sin(2 * np.pi * 3 * times), np.cos(2 * np.pi * 7 * times)], 1)
    inner = (times > 0.5) & (times < 4.5)  # far from the ends of the recording
    np.testing.assert_allclose(found[inner], expected[inner], atol=0.01)


@settings(deadline=None, max_examples=25)
@given(
    resample=st.sampled_from([None, 50.0, 100.0, 400.0]),
    context=st.floats(0.0, 1.5),
    window=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_a_trial_lies_where_it_is_said_to_within_its_surroundings(resample, context, window):
    whole = np.random.default_rng(0).standard_normal((2400, 2))
    read: list[tuple[int, int]] = []

    def reading(first, last):
        read.append((first, last))
        return whole[first:last]

    recording = Recording(Path("r"), "s", "x", ["a", "b"], RATE, 2400, reading)
    options = SourceOptions(window=window, resample=resample)
    cut = CutRecording(recording, windows, options, Remarks())
    for index, info in enumerate(cut.trials):
        plain = cut.read(index)
        read.clear()
        signal, first, bins = cut.read_around(index, context)
        assert bins == len(plain)
        np.testing.assert_allclose(signal[first : first + bins], plain, atol=2e-2)
        low, high = {"train": (0, 1920), "val": (1920, 2160), "test": (2160, 2400)}[info.split]
        assert all(low <= a and b <= high for a, b in read), "another split is never read"
        if resample is None:
            start = round(float(info.name.split(", ")[1].removesuffix(" s")) * RATE)
            assert first == min(round(context * RATE), start - low)
            end = min(start + bins + round(context * RATE), high)
            np.testing.assert_array_equal(signal, whole[start - first : end])


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    labels=st.lists(st.integers(0, 6), min_size=8, max_size=8),
)
def test_collation_keeps_every_value_and_masks_the_rest(lengths, labels):
    generator = np.random.default_rng(1)
    examples = [
        Example(
            signal=(signal := generator.standard_normal((bins, 3)).astype(np.float32)),
            target=signal + 1,
            mask=np.ones(bins, bool),
            session=place,
            labels=np.arange(1, 1 + labels[place]),
            phonemes=np.arange(1, 1 + labels[-1 - place]),
            row=f"s/0/{place}",
            text=None,
        )
        for place, bins in enumerate(lengths)
    ]
    batch = collate(examples)
    assert batch.signal.shape == (len(lengths), max(lengths), 3)
    assert batch.signal_mask.sum(1).tolist() == lengths
    for place, example in enumerate(examples):
        bins = len(example.signal)
        np.testing.assert_array_equal(batch.signal[place, :bins], example.signal)
        np.testing.assert_array_equal(batch.target[place, :bins], example.target)
        assert not batch.signal[place, bins:].any() and not batch.target[place, bins:].any()
        tokens = batch.tokens[place]
        assert tokens[tokens != -100].tolist() == example.labels.tolist()
        said = batch.phonemes[place]
        assert said[: batch.phoneme_lengths[place]].tolist() == example.phonemes.tolist()


def test_windows_of_a_recording_fit_together_after_resampling():
    whole = np.random.default_rng(2).standard_normal((4000, 1))
    expected = resample_poly(whole, 1, 2, axis=0, padtype="line")
    parts = [
        resampled(lambda a, b: whole[a:b], start, start + 400, (0, 4000), (RATE, 100.0))
        for start in range(0, 4000, 400)
    ]
    np.testing.assert_allclose(np.concatenate(parts)[50:-50], expected[50:-50], atol=1e-9)
