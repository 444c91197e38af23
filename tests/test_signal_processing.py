"""Reference and filters against MNE, closed forms and the whole signal at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from b2t.errors import UserError
from b2t.running_statistics import RunningStatistics
from b2t.signal_processing import Processing, ProcessingOptions
from b2t.signal_spec import SignalSpec, compare

NAMES = ["a", "b", "c", "d"]


def noise(T: int = 2000, C: int = 4) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((T, C)).cumsum(0) * 0.1 + 3


def process(signal, rate=200.0, **options):
    return Processing(ProcessingOptions(**options), NAMES, rate)(signal)


@pytest.mark.parametrize("band", [(1.0, 40.0), (None, 30.0), (2.0, None)])
def test_band_pass_is_that_of_mne(band):
    filters = pytest.importorskip("mne").filter
    signal = noise()
    low, high = band
    kind = {"order": 4, "ftype": "butter", "output": "sos"}
    expected = filters.filter_data(
        signal.T.copy(), 200.0, low, high, method="iir", iir_params=kind, verbose="error"
    ).T
    middle = slice(600, 1400)  # MNE pads the ends by a rule of its own
    found = process(signal, band_pass=band)
    np.testing.assert_allclose(found[middle], expected[middle], atol=1e-3)


def test_a_notch_takes_out_its_frequency_and_leaves_the_others():
    seconds = np.arange(4000) / 200
    kept, hum = np.sin(2 * np.pi * 11 * seconds), np.sin(2 * np.pi * 50 * seconds)
    found = process(np.stack([kept + hum] * 4, 1), notch=[50.0])[1000:-1000]
    assert np.abs(found - kept[1000:-1000, None]).max() < 0.02


def test_average_reference_leaves_bad_channels_out():
    signal = noise()
    found = process(signal, reference="average", bad_channels=["b"])
    good = signal[:, [0, 2, 3]]
    np.testing.assert_allclose(found[:, [0, 2, 3]], good - good.mean(1, keepdims=True))
    assert not found[:, 1].any()


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 300), max_size=6))
def test_a_causal_chain_as_bins_come_is_the_chain_on_the_whole(cuts):
    signal = noise(300)
    options = {"band_pass": (1.0, 40.0), "notch": [50.0], "reference": "average", "causal": True}
    whole = Processing(ProcessingOptions(**options), NAMES, 200.0)
    stream = whole.stream()
    parts = [stream.push(part) for part in np.split(signal, sorted(cuts))]
    np.testing.assert_allclose(np.concatenate(parts), whole(signal), atol=1e-9)


def test_a_filter_that_needs_what_follows_is_not_streamed():
    with pytest.raises(UserError, match="--causal"):
        Processing(ProcessingOptions(band_pass=(1.0, None)), NAMES, 200.0).stream()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"band_pass": (1.0, 100.0)}, "--band-pass 100: at 200 Hz .* below 100 Hz"),
        ({"notch": [120.0]}, "--notch 120"),
        ({"bad_channels": NAMES}, "all channels are bad"),
        ({"bad_channels": NAMES[1:], "reference": "average"}, "the mean of one good channel"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        process(noise(), **options)


def test_signals_prepared_otherwise_do_not_fit_a_model():
    done = ProcessingOptions(band_pass=(1.0, 40.0), bad_channels=["a"]).model_dump()
    model = SignalSpec(4, 200.0, processing=done)
    assert "1–40 Hz" in compare(model, SignalSpec(4, 200.0, processing={})).problems[0]
    others_bad = {**done, "bad_channels": ["c"]}
    assert not compare(model, SignalSpec(4, 200.0, processing=others_bad)).problems
    assert not compare(model, SignalSpec(4, 200.0)).problems


def test_running_statistics_without_forgetting_are_those_of_all_bins_so_far():
    signal = noise(60)
    running = RunningStatistics(4)
    found = np.concatenate([running.push(signal[:7]), running.push(signal[7:])])
    for place in range(1, 60):
        seen = signal[: place + 1]
        expected = (signal[place] - seen.mean(0)) / seen.std(0)
        np.testing.assert_allclose(found[place], expected, atol=1e-5)
    assert not found[0].any()


def test_running_statistics_forget_exponentially_and_start_where_they_are_told():
    signal = noise(80)
    running = RunningStatistics(4, 20.0, mean=np.full(4, 2.0), deviation=np.ones(4), weight=5.0)
    running.push(signal)
    weights = np.exp(-np.arange(80)[::-1] / 20.0)
    start = 5.0 * np.exp(-80 / 20.0)
    total = weights.sum() + start
    mean = (weights @ signal + start * 2.0) / total
    squares = weights @ (signal - mean) ** 2 + start * (1.0 + (2.0 - mean) ** 2)
    np.testing.assert_allclose(running.mean, mean)
    np.testing.assert_allclose(running.deviation, np.sqrt(squares / total))
