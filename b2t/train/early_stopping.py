"""When a validation metric has stopped improving."""

from dataclasses import dataclass

from b2t.train.best import Best


@dataclass
class EarlyStopping(Best):
    """Counts evaluations without improvement; its best is the last value that was one.

    Attributes:
        patience: evaluations without improvement before `should_stop`.
        min_delta: smallest change that counts as an improvement.
        restore_best: go on with the weights of `best_step`, not with the last ones.
        waited: evaluations since then; a value that is not finite never improves.
    """

    patience: int = 5
    min_delta: float = 0.0
    restore_best: bool = True
    waited: int = 0

    def update(self, value: float, step: int) -> bool:
        """Take in one evaluation; return whether it is an improvement."""
        improved = self.improved(value, self.min_delta)
        if improved:
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1
        return improved

    @property
    def should_stop(self) -> bool:
        """Whether the patience is used up."""
        return self.waited >= self.patience
