import math

import pytest

from b2t.quantize import ResidualVQ
from b2t.quantize.schedules import anneal


@pytest.mark.parametrize("schedule", ["cosine", "linear", "exponential"])
def test_a_schedule_runs_from_start_to_end_and_falls(schedule):
    values = [anneal(2.0, 0.5, step / 50, schedule) for step in range(51)]
    assert values[0] == 2.0 and math.isclose(values[-1], 0.5)
    assert values == sorted(values, reverse=True)
    assert anneal(2.0, 0.5, -1.0, schedule) == 2.0
    assert math.isclose(anneal(2.0, 0.5, 1.5, schedule), 0.5)


def test_schedules_halfway():
    assert math.isclose(anneal(2.0, 0.5, 0.5, "cosine"), 1.25)
    assert math.isclose(anneal(2.0, 0.5, 0.5, "linear"), 1.25)
    assert math.isclose(anneal(2.0, 0.5, 0.5, "exponential"), 1.0)
    assert anneal(2.0, 0.5, 0.1, "cosine") > anneal(2.0, 0.5, 0.1, "linear")
    with pytest.raises(ValueError, match="unknown schedule"):
        anneal(2.0, 0.5, 0.5, "step")


def test_progress_sets_the_temperature_and_survives_in_the_state():
    quantizer = ResidualVQ(4, 8, 2, temperature_schedule="linear")
    assert quantizer.temperature == 2.0
    quantizer.set_progress(0.5)
    assert quantizer.temperature == 1.25
    restored = ResidualVQ(4, 8, 2)
    restored.load_state_dict(quantizer.state_dict())
    assert restored.temperature == 1.25 and float(restored.codebooks.progress) == 0.5
    with pytest.raises(ValueError, match="must be positive"):
        quantizer.set_temperature(0.0)
