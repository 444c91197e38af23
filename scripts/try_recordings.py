"""Prepare, inspect, audit, train on and evaluate every recording in a folder; print a table.

    python scripts/try_recordings.py FOLDER --out tried
    python scripts/try_recordings.py FOLDER --out tried --only feis

Each folder below FOLDER is one data set. Those named in `RECIPES` are prepared with the options
written there, others as they are found. Each trains for 30 steps on one thread, in the phases of
the preset `demo`, a model of 32 dimensions: enough to see that a recording goes all the way, and
nothing about how well it could be read. A step that fails ends the data set and stands in the
table. What was tried before is known from OUT, and only printed again.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "B2T_THREADS": "1"}
RECIPES = {
    "feis": ["--text-column", "Label"],
    "t12_trial": ["--rate", "50", "--layout", "channels-first", "--window", "1"],
    "wordpair": ["--text-column", "association"],
    "p300_fif": ["--resample", "128"],
}
STEPS = 30
TRAINING = """
    --config demo phases.0.steps=15 phases.1.steps=5 phases.2.steps=10 codebook_start.after_steps=5
    codebook_start.frames_per_code=4 model.encoder.dim=32 model.encoder.depth=1
    model.encoder.heads=2 model.signal_decoder.heads=2 model.text_decoder.dim=32
    model.text_decoder.depth=1 model.text_decoder.heads=2 model.text_decoder.ffn_dim=64
    model.text_decoder.tokenizer=byte model.quantizer.codebook_size=32
    evaluation.every=30 evaluation.decode_trials=0 checkpoint.every=30 log.every=1
    log.progress=false log.report=false data.workers=0 data.audit_seconds=0
""".split()  # noqa: SIM905
HEADINGS = (
    "recording", "prepared with", "trials", "signal", "audit",
    "reconstruction loss, first and last 3 steps",
    "SNR", "seconds",
)  # fmt: skip


def main() -> int:
    """Try all, print the table; 1 where something failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="holds one folder per data set")
    parser.add_argument("--out", type=Path, default=Path("tried"), help="what is written (tried)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these data sets alone")
    args = parser.parse_args()
    args.folder, args.out = args.folder.resolve(), args.out.resolve()  # steps run in the checkout
    tried = {}
    for source in sorted(path for path in args.folder.iterdir() if path.is_dir()):
        if args.only and source.name not in args.only:
            continue
        if readable(source):
            tried[source.name] = attempt(source, args.out / source.name)
    print(table(tried))
    return int(any("failed" in result for result in tried.values()))


def readable(source: Path) -> bool:
    """Whether b2t finds a recording there; other folders hold texts or models."""
    from b2t.data.sources import formats

    return any(module.find(source) for module in formats())


def attempt(source: Path, out: Path) -> dict[str, Any]:
    """Take one data set all the way, or as far as it goes; what it gave is kept in ``out``."""
    record = out / "tried.json"
    if record.exists():
        known: dict[str, Any] = json.loads(record.read_text("utf-8"))
        return known
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    data, run = out / "data", out / "run"
    b2t, options = [sys.executable, "-m", "b2t.cli"], RECIPES.get(source.name, [])
    began = time.monotonic()
    result: dict[str, Any] = {"options": options}
    for name, command in (
        ("prepare", [*b2t, "prepare", source, data, *options]),
        ("inspect", [*b2t, "inspect", data, "--plot", out / "trial.png"]),
        ("audit", [*b2t, "audit", data, "--out", out / "audit.json", "--plot", out / "audit.png"]),
        ("train", [sys.executable, ROOT / "train_ds.py", f"data.path={data}", f"run.dir={run}",
                   "--deepspeed_config", ROOT / "ds_configs" / "zero2_cpu.json", *TRAINING]),
        ("evaluate", [*b2t, "evaluate", run]),
    ):  # fmt: skip
        failure = call(name, command, out)
        if failure:
            result["failed"] = failure
            break
    result["seconds"] = time.monotonic() - began
    result.update(facts(out))
    record.write_text(json.dumps(result, indent=1), "utf-8")
    return result


def call(name: str, command: list[Any], out: Path) -> str:
    """Run one step, its output in a file; return the last line that it said where it failed."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": path}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    (out / f"{name}.log").write_text(f"{done.stdout}\n{done.stderr}", "utf-8")
    if done.returncode == 0:
        return ""
    said = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
    return f"{name}: {said}"


def facts(out: Path) -> dict[str, Any]:
    """Read what the steps wrote, as far as they came."""
    found: dict[str, Any] = {}
    if (out / "data" / "b2t.json").exists():
        record = json.loads((out / "data" / "b2t.json").read_text("utf-8"))
        found["format"] = record["format"]
        found["trials"] = list(record["rows"].values())
        found["channels"], found["rate"] = len(record["channels"]), record["sampling_rate"]
    if (out / "audit.json").exists():
        findings = json.loads((out / "audit.json").read_text("utf-8"))["findings"]
        bad = [each for each in findings if each["level"] != "note"]
        found["audit"] = list(dict.fromkeys(each["check"] for each in bad))
    if (out / "run" / "metrics.jsonl").exists():
        lines = (out / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
        losses = [r["loss/reconstruction"] for r in map(json.loads, lines) if "loss/total" in r]
        found["steps"] = len(losses)
        found["losses"] = [sum(some) / len(some) for some in (losses[:3], losses[-3:])]
    if (out / "run" / "evaluation.json").exists():
        evaluation = json.loads((out / "run" / "evaluation.json").read_text("utf-8"))
        found["snr_db"] = evaluation["snr_db"]
    return found


def table(tried: dict[str, dict[str, Any]]) -> str:
    """Return the results in Markdown, one row per data set."""
    rows = [HEADINGS, tuple("---" for _ in HEADINGS)]
    for name, result in tried.items():
        losses = result.get("losses")
        cells = [
            f"{name} ({result.get('format', '?')})",
            f"`{shlex.join(result['options'])}`" if result["options"] else "as found",
            ", ".join(f"{count:,}" for count in result.get("trials", [])),
            f"{result['channels']} × {result['rate']:g} Hz" if "rate" in result else "",
            ", ".join(result["audit"]) or "no findings" if "audit" in result else "",
            f"{losses[0]:.2f}, {losses[1]:.2f}" if losses else "",
            f"{result['snr_db']:.2f} dB" if result.get("snr_db") is not None else "",
            f"{result['seconds']:.0f}",
        ]
        if "failed" in result:
            cells[4] = f"FAILED at {result['failed']}"
        rows.append(tuple(cells))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    sys.exit(main())
