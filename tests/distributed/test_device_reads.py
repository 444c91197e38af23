"""Between log steps nothing reads a tensor that would live on the device, but what is listed."""

import json

import pytest

pytestmark = pytest.mark.distributed

ON_THE_CPU = {
    "b2t/train/ranks.py:sum": "sums of the CPU group",
    "b2t/train/step.py:totals": "counts of a batch before it is moved to the device",
    "b2t/model/brain_to_text.py:counts": "the same",
    "b2t/quantize/update.py:revives_next": "clocks of the quantizer, which stay on the CPU",
    "b2t/quantize/layers.py:prepared": "centres of the codes for the CPU's search alone",
    "b2t/quantize/quantizer_state.py:initialized": "the same",
    "b2t/quantize/quantizer_state.py:temperature": "the same",
    "b2t/quantize/residual_vq.py:_draw": "the same",
    "b2t/quantize/residual_vq.py:_hashes": "the same",
    "b2t/quantize/revival.py:_noise": "the same",
}

NEEDED = {
    "b2t/quantize/frames.py:valid_latents": "whether all real frames are finite, else which",
    "b2t/quantize/update.py:_revive": "whether a code is dead, every revival_every steps",
    "b2t/quantize/revival.py:parents_of": "which codes to split, where one is dead",
    "b2t/quantize/revival.py:revive_layer": "the same",
    "b2t/quantize/revival.py:dead_codes": "the same",
    "b2t/quantize/revival.py:_split": "the same",
    "b2t/quantize/revival.py:_directions": "the same",
    "b2t/model/text_decoder.py:forward": "on CPUs transformers looks for masked frames",
    "b2t/train/engine.py:step": "DeepSpeed looks for overflow and clips",
    "b2t/train/plain.py:_clip": "the same without ZeRO",
}


@pytest.fixture(scope="module", params=[True, False], ids=["zero", "plain"])
def reads(request, training, tiny):
    """Places that read, and how often, in all steps but those that log."""
    config = tiny(
        phases=[{"name": "joint", "steps": 24, "lr": 1e-3, "warmup_steps": 2}],
        log={"every": 6, "progress": False, "report": False},
        monitor={"window": 8},
        optim={"zero_on_one_rank": request.param},
    )
    done = training.run(
        f"reads-{request.param}",
        config=config,
        launcher="python",
        ranks=1,
        script="tests/distributed/reads_driver.py",
    )
    found = json.loads((done.folder / "reads.json").read_text("utf-8"))
    assert found["steps"] == 20
    return found["reads"]


def test_only_listed_places_read(reads):
    assert set(reads) <= {*ON_THE_CPU, *NEEDED}


def test_monitors_read_nothing(reads):
    assert not [place for place in reads if "monitor" in place or "window" in place]


def test_the_probe_sees_what_is_known_to_read(reads):
    """A probe that is blind would pass the tests above."""
    known = ("b2t/train/ranks.py:sum", "b2t/train/step.py:totals")
    known += ("b2t/quantize/frames.py:valid_latents",)
    assert set(known) <= set(reads)
    assert {"b2t/train/engine.py:step", "b2t/train/plain.py:_clip"} & set(reads)


def test_frames_are_counted_once_a_step(reads):
    assert reads["b2t/quantize/frames.py:valid_latents"] == 20
