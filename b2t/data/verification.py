"""Prepared trials against the checksums written with them: all, or a few at the start of a run."""

from pathlib import Path

from tqdm import tqdm

from b2t.data import checksums
from b2t.data.dataset import opened
from b2t.data.examine import examine
from b2t.data.prepare import VERSION
from b2t.data.record import trusted_record
from b2t.errors import UserError
from b2t.log import logger


def verify(path: str | Path) -> int:
    """Compare every trial with what was written when it was prepared; return how many.

    Data prepared before there were checksums are compared by their fingerprint.

    Raises:
        UserError: names the first trial that differs; or there is nothing to compare with.
    """
    splits = opened(path).splits
    folder = Path(path).expanduser()
    record = trusted_record(folder, splits) if folder.is_dir() else {}
    if not record:
        raise UserError(
            f"{path} has no checksums to compare with: `b2t prepare` writes them, and they hold "
            "for the folder as it wrote it"
        )
    if record.get("version") != VERSION:
        raise UserError(
            f"{path} has the checksums of another version of b2t, which this one cannot compare: "
            "prepare the data again"
        )
    rows = [(split, index) for split, dataset in splits.items() for index in range(len(dataset))]
    progress = tqdm(rows, desc="comparing", unit="trial", disable=None)
    compared = checksums.compare(folder, splits, progress, seconds=float("inf"))
    if compared is None and examine(splits, str(path)) != record["fingerprint"]:
        raise UserError(
            f"{path}: its content has another fingerprint than when it was prepared: the disk or a "
            "copy damaged it; prepare the data again"
        )
    return len(rows)


def verify_sample(path: str | Path, *, limit: int, seconds: float, seed: tuple[int, ...]) -> int:
    """Compare up to ``limit`` trials, drawn from all splits, for at most ``seconds``.

    Returns:
        Trials compared; 0 where the data have no checksums.

    Raises:
        UserError: names the first trial that differs.
    """
    splits = opened(path).splits
    folder = Path(path).expanduser()
    record = trusted_record(folder, splits) if folder.is_dir() else {}
    if not record:
        return 0
    if record.get("version") != VERSION:
        logger(__name__).warning(
            "%s has the checksums of another version of b2t: trials are not compared with them",
            path,
        )
        return 0
    rows = checksums.sampled_rows(splits, limit, seed)
    return checksums.compare(folder, splits, rows, seconds) or 0
