"""How long a loop waits for the quantizer's sums over ranks."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from b2t.quantize.distributed import PendingHalf, PendingSum


class QuantizerSync:
    """Times the packing of what the quantizer sums over ranks, and the waiting for it.

    Statistics and soft usage alike. On a GPU neither waits for the device: there it is the host's
    time. Used as a context.

    Attributes:
        seconds: of this rank so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._on = True
        self._places = [(kind, name) for kind in (PendingSum, PendingHalf)
                        for name in ("__init__", "wait")]  # fmt: skip

    def __enter__(self) -> "QuantizerSync":
        self._before = [getattr(kind, name) for kind, name in self._places]
        for (kind, name), method in zip(self._places, self._before, strict=True):
            setattr(kind, name, self._timed(method))
        return self

    def __exit__(self, *_: Any) -> None:
        for (kind, name), method in zip(self._places, self._before, strict=True):
            setattr(kind, name, method)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done inside."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                if self._on:
                    self.seconds += time.perf_counter() - began

        return timed
