"""The audit of the data in short, when a run starts."""

import time
from pathlib import Path

from b2t.config import Config
from b2t.data.record import read_record
from b2t.evaluate.audit import Audit, AuditOptions, Subject, audit, is_clean, verdict
from b2t.evaluate.audit.labels import Patches
from b2t.log import logger
from b2t.train.build import Materials

log = logger(__name__)
_TRIALS = 64


def look_at_data(config: Config, materials: Materials) -> None:
    """Look at a sample of the trials for `data.audit_seconds`, and say in a line what was found.

    Sentences are compared word for word; `b2t audit` reads everything and names places.
    """
    if not config.data.audit_seconds:
        return
    began = time.monotonic()
    try:
        found = audit_in_short(config, materials)
    except Exception as error:  # a run does not end because something beside it does
        log.warning("the data could not be audited (%s: %s)", type(error).__name__, error)
        return
    line = "audit of %d trials in %.1f s: %s"
    facts = (found.trials, time.monotonic() - began, verdict(found.findings))
    if is_clean(found.findings):
        log.info(line, *facts)
    else:
        log.warning(f"{line} (b2t audit %s says where, and what to do)", *facts, config.data.path)


def audit_in_short(config: Config, materials: Materials) -> Audit:
    """Audit a sample of the trials that a run reads."""
    data, info, encoder = config.data, materials.info, config.model.encoder
    splits = {data.train_split: materials.train, data.validation_split: materials.validation}
    record = read_record(Path(str(data.path)).expanduser())
    subject = Subject.of(splits, info.channels, info.sampling_rate, record)
    reads_phonemes = config.model.phoneme_head.enabled
    return audit(
        subject,
        AuditOptions(
            nearness=1.0,
            limit=_TRIALS,
            seconds=data.audit_seconds,
            patches=Patches(encoder.patch_size, encoder.patch_stride) if reads_phonemes else None,
            tokenizer=materials.tokenizer,
            max_tokens=data.max_text_tokens,
        ),
    )
