"""The table of losses, held against what the model does."""

import pytest

from b2t.model.objectives import COMPONENTS, COUNTS, DEFAULT_WEIGHTS, OBJECTIVES, WEIGHTED
from b2t.quantize import StepNorms
from b2t.quantize.objectives import LOSSES
from tests.model.small_model import batch_of, build


def losses(model, **counts):
    batch = batch_of([40, 23])
    batch.hidden = batch.signal_mask & (batch.row_ids[:, None] == batch.row_ids[0])
    every = {name: weight or 1.0 for name, weight in DEFAULT_WEIGHTS.items()}
    out = model(batch, StepNorms({**dict.fromkeys(COUNTS, 8.0), **counts}), every)
    return {name: loss.item() for name, loss in out.losses.items()}


@pytest.fixture(scope="module")
def by_gradient():
    return build(quantizer={"update_rule": "gradient"}).eval()


@pytest.mark.parametrize("count", COUNTS)
def test_each_loss_is_divided_by_its_count_and_no_other(by_gradient, count):
    one, two = losses(by_gradient), losses(by_gradient, **{count: 16.0})
    assert one.keys() == OBJECTIVES.keys()
    for name, objective in OBJECTIVES.items():
        half = 2.0 if objective.per == count else 1.0
        assert one[name] == pytest.approx(two[name] * half, rel=1e-6), name


@pytest.mark.parametrize(
    "component", sorted({loss.component for loss in OBJECTIVES.values()} - {"signal_decoder"})
)
def test_a_model_without_a_component_has_none_of_its_losses(component):
    model = build(**{component: {"enabled": False}}).eval()
    expected = {name for name, loss in WEIGHTED.items() if loss.component != component}
    assert losses(model).keys() == expected


def test_every_component_is_a_part_of_the_model_and_every_part_a_component():
    assert {name for name, _ in build().named_children()} == set(COMPONENTS)


def test_the_quantizer_and_the_table_agree_on_its_losses():
    of_quantizer = {name for name, loss in OBJECTIVES.items() if loss.component == "quantizer"}
    assert of_quantizer == {*LOSSES, "codebook"}
