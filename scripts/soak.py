"""Kill a run at random moments, again and again, and compare it with one never interrupted.

    python scripts/soak.py --kills 60 --out runs/soak

Two ranks train a small model on simulated recordings and save every few steps. All ranks get
SIGKILL at a random moment, wherever they are, and the same command follows. Then places that
chance has not hit twice are aimed at: the start, k-means, each phase, a save, a validation, a phase
change. A table says where kills landed. At the end weights, codebooks, losses, monitors' metrics
and decoded text must be bitwise those of the run that was left alone. Exit status 1 where they are
not, or where a place was never hit.

The run that is left alone is started as users start it (with --fp16, which tests alone may do on
CPUs, it is forked too). Killed ranks are forked from a process
that has imported the packages, which spares each of them ten seconds; they run the same `main`.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from soaking.kills import Soak
from soaking.runs import DS_CONFIG, FP16, REPOSITORY, leave_alone


def main() -> int:
    """Run the comparison; return the exit status."""
    options = arguments()
    began = time.monotonic()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    data = simulate(options.out)
    sections = {**DS_CONFIG, "fp16": FP16} if options.fp16 else DS_CONFIG
    (options.out / "ds.json").write_text(json.dumps(sections), "utf-8")
    soak = Soak(options, data)
    if options.fp16:
        soak.start("alone").wait()
    else:
        leave_alone(options, data)
    try:
        soak.rehearse()
        soak.kill_at_random()
        soak.aim_at_what_was_missed()
        soak.finish_and_compare()
    finally:
        soak.report(time.monotonic() - began)
    return 1 if soak.problems else 0


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60, help="SIGKILLs at random moments")
    parser.add_argument("--each", type=int, default=2, help="kills at least in each place")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="steps of all phases together")
    parser.add_argument(
        "--fp16",
        action="store_true",
        help="fp16 with the loss scaler; DeepSpeed's refusal of fp16 on CPUs is overridden",
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="give up after so long")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "soak")
    return parser.parse_args()


def simulate(out: Path) -> Path:
    """Write and prepare a few short recordings."""
    commands = [
        ["simulate", out / "recordings", "--sessions", "2", "--trials", "64", "12", "4"],
        ["prepare", out / "recordings", out / "data"],
    ]
    commands[0] += ["--electrodes", "4"]
    for command in commands:
        subprocess.run(
            [sys.executable, "-m", "b2t.cli", *map(str, command)],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=REPOSITORY,
        )
    return out / "data"


if __name__ == "__main__":
    sys.exit(main())
