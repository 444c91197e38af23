"""What a loop of one's own forgets: to start the codebooks, and to move them."""

from b2t.log import log_once

FORWARDS = 256
"""Training forwards after which an update is missed; no accumulation is as long."""


class Reminders:
    """Says once that a quantizer is not started or not updated; no part of its state.

    Attributes:
        start_follows: whoever trains it starts the codebooks later, so that passing the input
            through is meant.
    """

    def __init__(self) -> None:
        self.start_follows = False
        self._forwards = 0

    def passed_through(self, training: bool) -> None:
        """Note a forward before the start."""
        if training and not self.start_follows:
            log_once(
                "quantizer-not-started",
                "ResidualVQ passes its input through, without codes: its codebooks have not "
                "started. Call initialize([latents]) once, before training or after some steps of "
                "it, and update(out.stats) after each optimizer step",
            )

    def quantized(self, training: bool) -> None:
        """Note a forward with codes."""
        self._forwards += training
        if self._forwards == FORWARDS:
            log_once(
                "quantizer-not-updated",
                f"ResidualVQ: {FORWARDS} forwards in training mode without update(out.stats): its "
                "codebooks stay as they are. Call it after each optimizer step, or eval() on the "
                "quantizer to freeze it",
            )

    def updated(self) -> None:
        """Note an update."""
        self._forwards = 0
