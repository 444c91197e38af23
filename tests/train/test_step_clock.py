"""What counts as the time of a step."""

import json

import pytest

from b2t.train.trainer import Stopped


def test_what_comes_before_the_first_step_is_no_part_of_it(start, ds_file, orders):
    """A dry batch and building the engine can take longer than many steps on a CPU."""
    trainer = start("slow", ds_file(), "log.every=1")
    trainer.clock._since -= 3600
    orders[1] = lambda run: setattr(run.stop, "requested", True)
    with pytest.raises(Stopped):
        trainer.fit()
    lines = (trainer.config.run.dir / "metrics.jsonl").read_text().splitlines()
    times = [r["time/step_s"] for r in map(json.loads, lines) if "time/step_s" in r]
    assert times and max(times) < 600
    assert trainer.progress.seconds < 600, "nor of the time that the run says it took"
