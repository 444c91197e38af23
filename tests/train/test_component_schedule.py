"""Components with a warm-up or a course of their own, in a real engine."""

import json
import math

import pytest
import torch
from torch import nn

from b2t.config import OptimConfig, PhaseConfig
from b2t.train.ds_config import load_ds_config
from b2t.train.engine import PhaseEngine
from b2t.train.masters import initial_masters
from b2t.train.schedule import lr_factor

pytestmark = pytest.mark.usefixtures("one_rank")


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 8)
        self.signal_decoder = nn.Linear(8, 4)
        self.phoneme_head = nn.Linear(4, 4)

    def forward(self, x):
        return self.phoneme_head(self.signal_decoder(self.encoder(x))).square().mean()


def phase():
    return PhaseConfig(
        name="p", steps=8, lr=0.1, warmup_steps=2, min_lr_fraction=0.0,
        trainable=["encoder", "signal_decoder", "phoneme_head"], lr_scale={"encoder": 0.5},
        component_schedule={"encoder": "constant", "signal_decoder": "linear"},
        component_warmup_steps={"signal_decoder": 0},
    )  # fmt: skip


def expected(step):
    warm = min(1.0, (step + 1) / 2)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / 6)) if step >= 2 else warm
    return {"encoder": 0.05 * warm, "signal_decoder": 0.1 * (1 - step / 8),
            "phoneme_head": 0.1 * cosine}  # fmt: skip


def engine_for(tmp_path):
    content = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": False},
    }
    (tmp_path / "ds.json").write_text(json.dumps(content))
    model = Toy()
    file = load_ds_config(tmp_path / "ds.json")
    return PhaseEngine(model, phase(), OptimConfig(), file, initial_masters(model))


def test_each_component_has_its_course_and_keeps_it_over_a_resume(tmp_path):
    engine = engine_for(tmp_path)
    for step in range(8):
        assert engine.learning_rates() == pytest.approx(expected(step)), step
        engine.backward(engine(torch.randn(8, 4)))
        engine.step()
        if step == 3:
            saved = engine.state()
    resumed = engine_for(tmp_path)
    resumed.load_state(*saved)
    assert resumed.learning_rates() == pytest.approx(expected(4))
    resumed.backward(resumed(torch.randn(8, 4)))
    resumed.step()
    assert resumed.learning_rates() == pytest.approx(expected(5))


def test_without_a_component_the_phase_decides():
    assert lr_factor(0, phase()) == 0.5
    assert lr_factor(0, phase(), "signal_decoder") == 1.0
    assert lr_factor(8, phase(), "encoder") == 1.0
    assert lr_factor(8, phase(), "phoneme_head") == 0.0
