"""What a validation during training looks at, and what it makes of it."""

from types import SimpleNamespace

from datasets import load_from_disk

from b2t.config import load_config
from b2t.data.augment import Augment
from b2t.train.validation import validation_batches


def test_fewer_trials_come_from_all_sessions(tiny_trials):
    """Two sessions one after the other, of which a limit took the first alone."""
    validation = load_from_disk(str(tiny_trials))["train"].sort("session")
    trainer = SimpleNamespace(
        config=load_config("demo", ["evaluation.batch_size=4"]),
        ranks=SimpleNamespace(rank=0, world=1),
        materials=SimpleNamespace(
            validation=validation,
            tokenizer=None,
            info=SimpleNamespace(sessions=["day0", "day1"]),
            augment=Augment(enabled=False),
        ),
    )
    rows = [row for batch in validation_batches(trainer, 6) for row in batch.rows]
    assert sorted(row.split("/")[0] for row in rows) == ["day0"] * 3 + ["day1"] * 3
    assert len({row for batch in validation_batches(trainer, None) for row in batch.rows}) == 36
