"""Table and figure of the collapse study, from its finished runs."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from collapse.conditions import NAIVES, PEERS

BEGIN, END = "<!-- collapse study: begin -->", "<!-- collapse study: end -->"
OTHERS = (*PEERS, "faiss", "naive-ema")
MAIN = ("full", *NAIVES, *PEERS, "faiss", "none")
SNRS = {"snr_pooled_db": "pooled", "snr_median_db": "median", "snr_train_db": "train"}
# Worst layer's utilization, perplexity / K mean and worst layer, dB over naive.
TARGETS = {
    "8x256": (0.95, 0.85, 0.72, 5.5),
    "4x1024": (0.92, 0.78, 0.65, 4.0),
    "2x8192": (0.85, 0.65, 0.55, 3.5),
}

Group = dict[str, np.ndarray]


def scalars(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of one run that the table shows; NaN where there is none."""
    perplexity = result.get("perplexity_of_k", [np.nan])
    return {
        "utilization": min(result.get("utilization", [np.nan])),
        "perplexity": float(np.mean(perplexity)),
        "perplexity_worst": min(perplexity),
        "dead": result.get("dead", np.nan),
        **{name: result[name] for name in (*SNRS, "cosine", "effective_rank")},
        **{name: result[name] for name in ("ms_step", "ms_quantizer", "revived_per_step")},
    }


def groups_of(lines: list[dict[str, Any]], on: str) -> dict[tuple[str, str], dict[str, Group]]:
    """(data, size) → condition → number → its values over seeds, of the latest plan of each."""
    latest: dict[tuple, dict[str, Any]] = {}
    for line in lines:
        plan = line["plan"]
        if plan["on"] == on:
            latest[plan["data"], plan["size"], plan["condition"], plan["seed"]] = line
    found: dict[tuple[str, str], dict[str, list[dict[str, float]]]] = defaultdict(dict)
    for (data, size, condition, _), line in sorted(latest.items()):
        found[data, size].setdefault(condition, []).append(scalars(line["result"]))
    return {
        place: {
            name: {k: np.array([r[k] for r in runs]) for k in runs[0]} for name, runs in of.items()
        }
        for place, of in found.items()
    }


def spread(values: np.ndarray, digits: int, factor: float = 1.0) -> str:
    """Mean ± standard deviation over seeds; – where there is nothing to measure."""
    if np.isnan(values).any():
        return "–"
    text = f"{factor * values.mean():.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {factor * values.std(ddof=1):.{digits}f}"


COLUMNS: dict[str, tuple[str, int, float]] = {
    "used, worst layer (%)": ("utilization", 1, 100.0),
    "perplexity / K": ("perplexity", 3, 1.0),
    "worst layer": ("perplexity_worst", 3, 1.0),
    "dead codes": ("dead", 0, 1.0),
    "SNR pooled (dB)": ("snr_pooled_db", 2, 1.0),
    "median patch": ("snr_median_db", 2, 1.0),
    "train": ("snr_train_db", 2, 1.0),
    "cosine": ("cosine", 3, 1.0),
    "rank": ("effective_rank", 1, 1.0),
    "revived / step": ("revived_per_step", 2, 1.0),
    "ms / step": ("ms_step", 0, 1.0),
    "of it quantizer": ("ms_quantizer", 0, 1.0),
}


def table(groups: dict[str, Group], order: list[str]) -> str:
    """Markdown, one row for each condition."""
    rows = [
        "| condition | seeds | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for name in order:
        group = groups[name]
        cells = [spread(group[key], *rest) for key, *rest in COLUMNS.values()]
        rows.append(f"| {name} | {len(group['cosine'])} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def verdicts(size: str, groups: dict[str, Group]) -> str:
    """Targets beside what the recipe reached on average."""
    if size not in TARGETS or "full" not in groups:
        return ""
    use, mean, worst, over = TARGETS[size]
    full = {key: float(values.mean()) for key, values in groups["full"].items()}
    checks = [
        (
            f"utilization of the worst layer ≥ {100 * use:.0f} %",
            full["utilization"] - use,
            "{:+.3f}",
        ),
        (f"perplexity / K ≥ {mean}", full["perplexity"] - mean, "{:+.3f}"),
        (
            f"perplexity / K of the worst layer ≥ {worst}",
            full["perplexity_worst"] - worst,
            "{:+.3f}",
        ),
    ]
    for naive in (name for name in NAIVES if name in groups):
        for key in ("snr_pooled_db", "snr_median_db"):
            gain = full[key] - float(groups[naive][key].mean())
            text = f"{SNRS[key]} SNR over {naive} ≥ +{over} dB"
            checks.append((text, gain - over, "{:+.2f} dB"))
    others = [name for name in OTHERS if name in groups]
    for key, label in SNRS.items() if others else ():
        best = max(others, key=lambda name: float(groups[name][key].mean()))
        lead = full[key] - float(groups[best][key].mean())
        checks.append((f"{label} SNR not below the best other method ({best})", lead, "{:+.2f} dB"))
    rows = ["| target | distance | |", "|---|---|---|"]
    rows += [
        f"| {text} | {shown.format(d)} | {'reached' if d >= 0 else 'missed'} |"
        for text, d, shown in checks
    ]
    return "\n".join(rows)


def search_table(lines: list[dict[str, Any]]) -> str:
    """The settings tried on validation epochs, of each search the best mean SNR first."""
    keys = ("utilization", "perplexity", *SNRS)
    parts = []
    for (data, size), groups in sorted(groups_of(lines, "validation").items(), key=_place_of):
        rows = [
            f"| {data}, {size} | seeds | used, worst | perplexity / K | SNR pooled | median "
            "| train | mean |",
            "|---|---|---|---|---|---|---|---|",
        ]
        scores = {name: float(np.mean([g[k].mean() for k in SNRS])) for name, g in groups.items()}
        for name in sorted(groups, key=lambda name: (name.split()[0], -scores[name])):
            group = groups[name]
            cells = [f"{group[key].mean():.3f}" for key in keys] + [f"{scores[name]:.3f}"]
            rows.append(f"| {name} | {len(group['cosine'])} | " + " | ".join(cells) + " |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def figure(found: dict[tuple[str, str], dict[str, Group]], path: Path) -> None:
    """Pooled SNR over use of the codes, one panel for each recording and size."""
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.8 * rows), squeeze=False)
    colours = dict(zip(MAIN, plt.get_cmap("tab10").colors, strict=False))
    for axis, ((data, size), groups) in zip(axes.flat, found.items(), strict=False):
        _panel(axis, groups, colours)
        axis.set_title(f"{data}, {size.replace('x', ' × ')}")
        axis.set_xlabel("perplexity / K, mean of layers")
        axis.set_ylabel("pooled SNR, held out (dB)")
    for axis in list(axes.flat)[len(found) :]:
        axis.set_visible(False)
    drawn = [axis.get_legend_handles_labels() for axis in axes.flat]
    marks = {label: mark for pair in drawn for mark, label in zip(*pair, strict=True)}
    fig.tight_layout(rect=(0, 0.5 / fig.get_figheight(), 1, 1))
    fig.legend(marks.values(), marks, loc="lower center", ncols=5, fontsize=8, frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _panel(axis: Any, groups: dict[str, Group], colours: dict[str, Any]) -> None:
    for name, group in groups.items():
        x, y = group["perplexity"], group["snr_pooled_db"]
        if name == "none":
            axis.axhline(y.mean(), color="0.6", linestyle="--", label="no quantizer")
        elif name in MAIN:
            error = {"xerr": x.std(), "yerr": y.std()} if len(x) > 1 else {}
            axis.errorbar(x.mean(), y.mean(), fmt="o", color=colours[name], label=name, **error)
        else:
            axis.plot(x.mean(), y.mean(), "x", color="0.5")
    if set(groups) - set(MAIN):
        axis.plot([], [], "x", color="0.5", label="one feature changed")
    axis.set_xlim(0, 1)
    axis.grid(alpha=0.3)


def _place(key: tuple[str, str]) -> tuple[str, int]:
    """By recording, then by codes of a layer."""
    return key[0], int(key[1].split("x")[1])


def _place_of(item: tuple[tuple[str, str], dict[str, Group]]) -> tuple[str, int]:
    return _place(item[0])


def write_report(lines: list[dict[str, Any]], docs: Path) -> None:
    """Put the table between its markers in RESULTS.md, and the figure beside it."""
    groups = groups_of(lines, "held")
    found = {key: groups[key] for key in sorted(groups, key=_place)}
    parts = []
    for (data, size), groups in found.items():
        order = [name for name in MAIN if name in groups]
        order += sorted(set(groups) - set(MAIN))
        note = " (a simulation)" if data == "simulated" else ""
        parts.append(f"### {data}{note}, {size.replace('x', ' × ')}\n\n" + table(groups, order))
        parts.append(verdicts(size, groups))
    if found:
        figure(found, docs / "collapse_study.png")
        parts.insert(0, "![SNR over use of the codes](collapse_study.png)")
    parts.append("### Settings tried on validation epochs\n\n" + search_table(lines))
    body = "\n\n".join(part for part in parts if part)
    path = docs / "RESULTS.md"
    text = path.read_text() if path.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}")
