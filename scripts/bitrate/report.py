"""Table and figure of PER over bits per second."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BEGIN, END = "<!-- phoneme bitrate: begin -->", "<!-- phoneme bitrate: end -->"
FIGURE = "phoneme_bitrate.png"

Groups = dict[tuple[int, str], list[dict[str, Any]]]


def groups_of(lines: list[dict[str, Any]]) -> Groups:
    """(steps, point) → results of all seeds, latents as they are first, then by bits."""
    found: Groups = defaultdict(list)
    for line in lines:
        found[line["plan"]["steps"], line["plan"]["point"]].append(line["result"])
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[1][0]["bits"] or 0)))


def mean(results: list[dict[str, Any]], name: str) -> float | None:
    """Mean over seeds; None where there is nothing to measure."""
    values = [result[name] for result in results]
    return None if None in values else float(np.mean(values))


def table(groups: Groups) -> str:
    """Markdown, one row for each point."""
    rows = [
        "| steps | point | seeds | PER test (95 %, first seed) | over latents | PER val "
        "| over latents | bits/s stored | by entropy | used, worst |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (steps, name), results in groups.items():
        low, high = results[0]["per_interval"]
        cells = [f"{steps}", name, f"{len(results)}"]
        for split in ("test", "val"):
            rate = mean(results, f"per_{split}")
            interval = f" ({100 * low:.1f}–{100 * high:.1f})" if split == "test" else ""
            cells += [f"{100 * rate:.1f} %{interval}", _cost(groups, steps, results, split)]
        bits, entropy, used = (
            mean(results, key) for key in ("bits", "bits_entropy", "utilization")
        )
        cells += ["–" if value is None else f"{value:.0f}" for value in (bits, entropy)]
        cells.append("–" if used is None else f"{100 * used:.0f} %")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cost(groups: Groups, steps: int, results: list[dict[str, Any]], split: str) -> str:
    """Points of PER above latents that are not coded, of as many steps."""
    reference = groups.get((steps, "none"))
    if reference is None:
        return "–"
    name = f"per_{split}"
    return f"{100 * (mean(results, name) - mean(reference, name)):+.1f}"


def figure(groups: Groups, path: Path) -> None:
    """PER on the test split over stored bits per second, one line for each number of steps."""
    fig, axis = plt.subplots(figsize=(6.4, 4.2))
    colours = plt.get_cmap("tab10").colors
    highest = 0.0
    for colour, steps in zip(colours, sorted({steps for steps, _ in groups}), strict=False):
        label = (
            "codes put into the finished model" if steps == 0 else f"trained on for {steps} steps"
        )
        plain, others = [], []
        for (at, name), results in groups.items():
            if at != steps:
                continue
            bits, rate = mean(results, "bits"), 100 * mean(results, "per_test")
            if bits is None:
                axis.axhline(rate, color=colour, linestyle="--", linewidth=1)
            else:
                (plain if name[0].isdigit() else others).append((bits, rate, name))
        highest = max([highest, *(rate for _, rate, _ in plain)])
        for bits, rate, name in plain:
            axis.annotate(name, (bits, rate), fontsize=7, xytext=(3, 4), textcoords="offset points")
        axis.plot([p[0] for p in plain], [p[1] for p in plain], "o", color=colour, label=label)
        axis.plot([p[0] for p in others], [p[1] for p in others], "x", color=colour, alpha=0.6)
    axis.plot([], [], "kx", alpha=0.6, label="another setting of the quantizer")
    axis.plot([], [], "k--", linewidth=1, label="latents that are not coded")
    axis.set_xscale("log")
    if highest:  # settings that are far worse than any plain point stay in the table
        axis.set_ylim(0, 1.1 * highest)
    axis.set_xlabel("bits per second, as stored")
    axis.set_ylabel("phoneme error rate, test (%)")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def write_report(lines: list[dict[str, Any]], docs: Path) -> None:
    """Put the table between its markers in RESULTS.md, and the figure beside it."""
    groups = groups_of(lines)
    figure(groups, docs / FIGURE)
    path = docs / "RESULTS.md"
    text = path.read_text() if path.exists() else ""
    if BEGIN not in text:
        text += f"\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    body = f"![PER over bits per second]({FIGURE})\n\n{table(groups)}"
    path.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}")
