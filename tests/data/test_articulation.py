import numpy as np
import pytest

from b2t.data import articulation
from b2t.data.articulation import (
    ARTICULATORS,
    BIN_SECONDS,
    TARGETS,
    Utterance,
    movements,
    time_sentence,
)
from b2t.data.grammar import load_grammar
from b2t.data.phonemes import PHONEMES, SIL, to_ids


def spoken(phones: str, bins: int = 60) -> Utterance:
    ids = np.array([SIL, *to_ids(phones.split()), SIL])
    return Utterance("", tuple(ids[1:-1]), ids, np.full(len(ids), bins))


def still(utterances):
    return movements(utterances, 0.0, np.random.default_rng(0))


def test_every_phone_has_its_own_targets():
    rows = articulation._ROWS
    assert set(rows) == set(PHONEMES[1:])
    described = {name: TARGETS[index].tobytes() for name, index in rows.items()}
    assert len(set(described.values())) == 40
    assert np.abs(TARGETS).max() <= 1


def test_every_phone_has_a_duration():
    assert np.isfinite(articulation.DURATIONS[1:]).all()


@pytest.mark.parametrize("rate", [30.0, 60.0, 120.0])
def test_speaking_rate(rate):
    rng = np.random.default_rng(0)
    texts = load_grammar(1000).draw_different(400, rng)
    timed = [time_sentence(text, rate, rng) for text in texts]
    minutes = sum(item.bins[1:-1].sum() for item in timed) * BIN_SECONDS / 60
    words = sum(item.labels.count(SIL) for item in timed)
    assert words / minutes == pytest.approx(rate, rel=0.08)


def test_labels_and_timing_agree():
    item = time_sentence("The boy is here.", 60.0, np.random.default_rng(1))
    assert item.phones[1:-1].tolist() == list(item.labels)
    assert item.labels.count(SIL) == 4
    assert (item.bins >= 1).all()
    assert len(item.frames()) == item.length == len(still([item]))


def test_long_phones_come_near_their_targets():
    moved = still([spoken("M S")])
    middle = {phone: moved[60 * position + 55] for position, phone in ((1, "M"), (2, "S"))}
    lips, voice = ARTICULATORS.index("lips"), ARTICULATORS.index("voice")
    nasal = ARTICULATORS.index("nasal")
    assert middle["M"][nasal] > 0.6 > 0.2 > middle["S"][nasal]
    assert middle["M"][lips] > 0.8
    assert middle["M"][voice] > 0.4 and middle["S"][voice] < -0.4
    assert middle["M"][-2] == pytest.approx(1, abs=1e-3)
    assert moved[50, -1] == pytest.approx(1, abs=1e-3)


def test_free_articulators_follow_their_neighbours():
    rounding = ARTICULATORS.index("round")
    beside_rounded = still([spoken("UW T UW")])[60 * 2 + 55, rounding]
    beside_spread = still([spoken("IY T IY")])[60 * 2 + 55, rounding]
    assert beside_rounded > 0.5 > 0 > beside_spread


def test_spring_is_critically_damped():
    steps = np.repeat([0.0, 1.0], [20, 60])[:, None]
    response = articulation._spring(steps, 0.05)[:, 0]
    seconds = np.arange(60) * BIN_SECONDS + BIN_SECONDS
    expected = 1 - (1 + seconds / 0.05) * np.exp(-seconds / 0.05)
    np.testing.assert_allclose(response[20:], expected, atol=5e-3)
    np.testing.assert_array_equal(response[:20], 0)
    assert (np.diff(response) >= -1e-12).all()


def test_variability_moves_targets_by_its_standard_deviation():
    item = spoken("AA " * 400, bins=40)
    moved = movements([item], 0.1, np.random.default_rng(0))
    reached = moved[40 * np.arange(2, 400) + 39, : len(ARTICULATORS)]
    np.testing.assert_allclose(reached.std(axis=0), 0.1, rtol=0.15)
