"""Kills of one run, again and again, at random moments and in places aimed at."""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

from soaking.comparison import compare
from soaking.runs import (
    PHASES,
    PLACES,
    KillableRun,
    environment,
    newest_step,
    place_of,
    steps_of_phases,
)

_ONCE = ("k-means", *(f"step of phase {phase}" for phase in PHASES[:-1]))
"""Places that a run passes once, in this order, before the last phase."""


class Soak:
    """Kills one run again and again, and remembers where.

    Attributes:
        kills: what each kill hit.
        compared: finished runs that were compared with the one left alone.
        problems: what went wrong, empty after a good soak.
    """

    def __init__(self, options: argparse.Namespace, data: Path) -> None:
        self.options, self.data = options, data
        self.deadline = time.monotonic() + 60 * options.minutes
        self.kills: list[dict] = []
        self.compared = 0
        self.problems: list[str] = []
        self._random = random.Random(options.seed)
        os.environ.update(environment(0, 1, 0))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            [
                "soaking.runs",
                "deepspeed",
                "b2t.train.trainer",
                "b2t.train.main",
                "b2t.train.startup",
            ]
        )
        self._start_s = self._training_s = 0.0
        self._spans: dict[str, float] = {}

    def start(self, name: str = "killed") -> KillableRun:
        """Start a run or go on with it."""
        return KillableRun(self.options, self.data, self._context, name)

    def rehearse(self) -> None:
        """Time the start, the training and each place in a run that is not killed."""
        run = self.start()
        run.wait()
        trace = run.trace()
        first = next(when for when, place in trace if place.startswith("opening step"))
        for number, (when, _) in enumerate(trace[:-1]):
            place = place_of([visited for _, visited in trace[: number + 1]])
            self._spans[place] = max(self._spans.get(place, 0.0), trace[number + 1][0] - when)
        self._start_s, self._training_s = first, trace[-1][0] - first
        print(f"start {first:.1f} s, training {self._training_s:.1f} s", flush=True)
        self._compare()

    def kill_at_random(self) -> None:
        """Kill one run in six before its first step, others in what half of the training takes."""
        while len(self.kills) < self.options.kills and not self._out_of_time():
            run = self.start()
            moment = self._random.uniform(0.0, self._start_s)
            if self._random.random() < 5 / 6:
                while run.where() == "start" and run.running:
                    time.sleep(0.005)
                moment = self._random.uniform(0.0, 0.5 * self._training_s)
                moment += time.monotonic() - run.began
            while time.monotonic() < run.began + moment and run.running:
                time.sleep(0.001)
            self._kill(run, "random")

    def aim_at_what_was_missed(self) -> None:
        """Kill in places that random moments have hit fewer than `--each` times."""
        while missing := self.missing():
            if self._out_of_time():
                return
            self._aim(next((place for place in missing if self._lies_ahead(place)), missing[0]))

    def missing(self) -> list[str]:
        """Places that were hit too rarely."""
        hits = self.hits()
        return [place for place in PLACES if hits[place] < self.options.each]

    def hits(self) -> Counter:
        """How many kills hit each place."""
        hits = Counter(place for kill in self.kills for place in {*kill["places"]})
        hits["half-written checkpoint"] = sum(kill["half_written"] for kill in self.kills)
        return hits

    def finish_and_compare(self) -> None:
        """Let the run finish, undisturbed, and compare it."""
        self.start().wait()
        self._compare()

    def report(self, seconds: float) -> None:
        """Print the table of places, and write `soak.json`."""
        hits = self.hits()
        never = [place for place in PLACES if not hits[place]]
        self.problems += [f"never killed in: {place}" for place in never]
        width = max(map(len, PLACES))
        print(f"\n{'place':{width}}  kills (of a rank at least)")
        print(*(f"{place:{width}}  {hits[place]}" for place in PLACES), sep="\n")
        record = {
            "kills": self.kills,
            "hits": hits,
            "runs_compared": self.compared,
            "seconds": round(seconds, 1),
            "problems": self.problems,
        }
        (self.options.out / "soak.json").write_text(json.dumps(record, indent=1), "utf-8")
        resumes = f"{len(self.kills)} kills, {self.compared} runs to their end, {seconds:.0f} s"
        print("\n".join(self.problems) or f"{resumes}: bitwise equal to the run left alone")

    def _out_of_time(self) -> bool:
        if time.monotonic() < self.deadline:
            return False
        self.problems = [f"out of time after {self.options.minutes:g} minutes"]
        return True

    def _kill(self, run: KillableRun, how: str) -> None:
        """Kill a run, or start over where it has finished by itself."""
        if not run.running:
            run.require_good_end()
            self._compare()
            return
        run.kill()
        places = [run.where(rank) for rank in range(self.options.ranks)]
        last = run.trace()
        self.kills.append(
            {
                "how": how,
                "places": places,
                "half_written": run.half_written,
                "after_s": round(time.monotonic() - run.began, 3),
                "rank0": last[-1][1] if last else "importing",
                "checkpoint": newest_step(run.folder),
            }
        )
        print(f"kill {len(self.kills)}: {json.dumps(self.kills[-1])}", flush=True)

    def _aim(self, target: str) -> None:
        run = self.start()
        delay = self._random.uniform(0.0, 0.8 * self._spans.get(target, 0.0))
        while run.running:
            if target == "half-written checkpoint" and run.half_written:
                break
            if run.where() == target:
                time.sleep(delay)
                break
            time.sleep(0.0005)
        self._kill(run, f"aimed at {target}")

    def _lies_ahead(self, place: str) -> bool:
        """Whether the run, as it is, will still come to a place."""
        first, second, _ = steps_of_phases(self.options.steps)
        ends = dict(zip(_ONCE, (6, first, first + second), strict=True))
        return newest_step(self.options.out / "killed") < ends.get(place, self.options.steps)

    def _compare(self) -> None:
        """Compare a finished run, and make room for another."""
        alone, killed = self.options.out / "alone", self.options.out / "killed"
        if problems := compare(alone, killed):
            self.problems = problems
            raise SystemExit(f"{killed} differs from {alone}")
        self.compared += 1
        shutil.rmtree(killed)
