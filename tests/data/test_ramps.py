"""Augmentation that changes within a phase: straight lines, the same on any ranks and resumed."""

import numpy as np
import pytest
import torch

from b2t.cli import main
from b2t.config import load_config
from b2t.data.augment import Augment, AugmentCourse
from b2t.data.augment_figure import OFF, variants
from b2t.data.batches import BatchPlan, TrialRows, train_batches
from b2t.data.options import AugmentOptions
from b2t.data.ramps import ramps_of, values_at
from b2t.data.trials import signal_lengths
from b2t.errors import UserError
from tests.data.test_batches import SESSIONS, Bytes, take, trials

RAMPS = {
    "noise_std": {"from": 0.0, "to": 2.0, "steps": 4},
    "scale": {"from": [1.0, 1.0], "to": [0.5, 2.0], "share": 0.5},
    "time_masks": {"from": 0, "to": 3},
}


def course():
    return AugmentCourse(lambda step: AugmentOptions(**{**OFF, **values_at(RAMPS, step, 12)}))


@pytest.mark.parametrize(
    ("step", "noise", "scale", "masks"),
    [(0, 0.0, (1, 1), 0), (1, 0.5, (1 - 1 / 12, 7 / 6), 0), (3, 1.5, (0.75, 1.5), 1),
     (6, 2.0, (0.5, 2.0), 2), (12, 2.0, (0.5, 2.0), 3), (999, 2.0, (0.5, 2.0), 3)],
)  # fmt: skip
def test_a_ramp_is_a_straight_line_and_then_stays(step, noise, scale, masks):
    found = values_at({**RAMPS, "offset_std": 0.3}, step, 12)
    assert found["noise_std"] == pytest.approx(noise) and found["scale"] == pytest.approx(scale)
    assert found["time_masks"] == masks and isinstance(found["time_masks"], int)
    assert found["offset_std"] == 0.3


def test_noise_of_a_batch_is_that_of_its_step():
    dataset = trials()
    plan = BatchPlan(signal_lengths(dataset), 8)
    ramp = {"noise_std": {"from": 0.0, "to": 100.0, "steps": 5}}
    rising = AugmentCourse(lambda step: AugmentOptions(**{**OFF, **values_at(ramp, step, 9)}))
    loader = train_batches(dataset, plan, Bytes(), SESSIONS, rising, seed=1, micro_batch=8)
    for step, (_, _, (batch,)) in enumerate(take(loader, 8)):
        moved = batch.to("cpu")
        noise = (moved.signal - moved.target)[moved.signal_mask]
        assert noise.std().item() == pytest.approx(20.0 * min(step, 5), rel=0.1)


def test_ranks_workers_and_resumes_ramp_alike():
    dataset = trials()
    plan = BatchPlan(signal_lengths(dataset), 8)
    common = (dataset, plan, Bytes(), SESSIONS)

    def read(steps, **options):
        rows = {}
        for rank in range(options.get("world", 1)):
            loader = train_batches(*common, course(), seed=1, rank=rank, **options)
            for epoch, _, batches in take(loader, steps):
                for batch in (batch.to("cpu") for batch in batches):
                    for place, name in enumerate(batch.rows):
                        rows[epoch, name] = batch.signal[place][batch.signal_mask[place]]
        return rows

    whole = read(7, micro_batch=8)
    shared = read(7, micro_batch=2, accumulation=2, world=2, workers=2)
    assert whole.keys() == shared.keys()
    assert all(torch.equal(whole[key], shared[key]) for key in whole)
    epoch, position = plan.place(1, 0, 4)
    resumed = read(3, micro_batch=8, epoch=epoch, position=position, consumed=4)
    assert len(resumed) == 24
    assert all(torch.equal(whole[key], resumed[key]) for key in resumed)


def test_what_is_constant_is_drawn_as_without_a_ramp():
    rows = TrialRows(trials(), Bytes(), SESSIONS, course(), seed=3)
    same = TrialRows(trials(), Bytes(), SESSIONS, Augment(**values_at(OFF | RAMPS, 3, 12)), seed=3)
    for index in range(5):
        one, other = rows.example(2, index, step=3), same.example(2, index)
        assert one.options == other.options
        for a, b in zip(one.draws, other.draws, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_phase_of_a_configuration_ramps_over_its_steps():
    config = load_config(
        "demo",
        [
            "phases.1.augment={noise_std: {from: 0.2, to: 1.2}, time_shift_ms: 0}",
            "phases.1.steps=50",
        ],
    )
    assert [config.augment_of(1, step).noise_std for step in (0, 25, 50, 70)] == pytest.approx(
        [0.2, 0.7, 1.2, 1.2]
    )
    assert config.augment_of(1).time_shift_ms == 0
    again = load_config("demo", [f"phases.1.augment={config.phases[1].augment}"])
    assert again.phases[1].augment == config.phases[1].augment


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{noise_std: {from: 0.1}}", r"phases\.0\.augment\.noise_std\.to: Field required; a ramp"),
        ("{noise_std: {from: 0, to: 1, step: 3}}", r"noise_std\.step: Extra"),
        ("{noise_std: {from: 0, to: 1, steps: 3, share: 0.5}}", "steps and share say the same"),
        ("{noise_std: {from: 0, to: -1}}", r"phases\.0\.augment\.noise_std: .*greater than"),
        ("{noise_std: {from: 0, to: [1, 2]}}", "both be numbers"),
        ("{scale: {from: [1, 1], to: [2, 1]}}", "low, high"),
        ("{noise: {from: 0, to: 1}}", r"phases\.0\.augment\.noise: Extra"),
        ("{enabled: {from: 0, to: 1}}", "enabled: is the same in all steps"),
        ("{smoothing_ms: {from: 0, to: 1}}", "the same in all phases"),
    ],
)  # fmt: skip
def test_a_ramp_that_makes_no_sense_is_refused_by_name(value, message):
    with pytest.raises(UserError, match=message):
        load_config("demo", [f"phases.0.augment={value}"])


def test_a_ramp_of_all_data_is_refused():
    with pytest.raises(UserError, match=r"data\.augment\.noise_std"):
        load_config("demo", ["data.augment.noise_std={from: 0, to: 1}"])


def test_the_figure_shows_the_course_of_a_ramp(tiny_trials, tmp_path, capsys):
    shown = variants(AugmentOptions(**{**OFF, "noise_std": 2.0}), ramps_of({**RAMPS}))
    assert list(shown) == [
        "noise_std = 0 at step 0", "noise_std = 1 at step 2", "noise_std = 2 at step 4",
        "scale = 1–1 at 0 % of the phase", "scale = 0.75–1.5 at 25 % of the phase",
        "scale = 0.5–2 at 50 % of the phase", "time_masks = 0 at 0 % of the phase",
        "time_masks = 2 at 50 % of the phase", "time_masks = 3 at 100 % of the phase",
        "all together",
    ]  # fmt: skip
    assert [augment.noise_std for augment in shown.values()] == [0, 1, 2, *[0] * 6, 2]
    file = tmp_path / "ramp.png"
    command = ["inspect", str(tiny_trials), "--plot", str(file), "--augment"]
    assert main([*command, "noise_std={from: 0, to: 1, steps: 100}"]) == 0
    assert file.stat().st_size > 20_000
    assert main([*command, "noise_std={from: 0}"]) == 2
    assert "--augment noise_std.to: Field required" in capsys.readouterr().err
