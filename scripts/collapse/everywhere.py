"""Report of runs with unseen subjects: several recordings, several autoencoders, one peer."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from collapse.report import SNRS, scalars

BEGIN, END = "<!-- unseen subjects: begin -->", "<!-- unseen subjects: end -->"
PEER = "vqp-best"
OTHERS_SHOWN = {
    "utilization": (0.01, ".0f"),
    "perplexity": (1, ".2f"),
    "ms_step": (1, ".0f"),
    "ms_quantizer": (1, ".0f"),
}
"""Unit and format of what the table shows beside SNRs."""

Runs = dict[int, dict[str, float]]
"""Numbers of a run, by seed."""
Places = dict[tuple[str, str], dict[str, Runs]]
"""(recording, autoencoder) → condition → runs."""


def places_of(lines: list[dict[str, Any]], on: str) -> Places:
    """Runs that were measured on ``on``, the latest of each plan."""
    found: Places = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        plan = line["plan"]
        if plan["on"] == on:
            runs = found[plan["data"], plan["autoencoder"]][plan["condition"]]
            runs[plan["seed"]] = scalars(line["result"])
    return {place: dict(found[place]) for place in sorted(found)}


def leads(runs: Runs, others: Runs, key: str) -> np.ndarray:
    """How far ``runs`` are ahead of ``others``, for each seed that both have."""
    return np.array([runs[s][key] - others[s][key] for s in sorted(runs) if s in others])


def spread(values: np.ndarray, sign: bool = False) -> str:
    """Mean ± standard deviation over seeds."""
    if not len(values):
        return "–"
    text = f"{values.mean():+.2f}" if sign else f"{values.mean():.2f}"
    return text if len(values) == 1 else f"{text} ± {values.std(ddof=1):.2f}"


def table(places: Places) -> str:
    """Every condition at every place, its SNRs and its lead over the peer of the same seed."""
    rows = [
        "| recording | autoencoder | condition | seeds | "
        + " | ".join(f"SNR {label} (dB) | over {PEER}" for label in SNRS.values())
        + " | used, worst (%) | perplexity / K | ms / step | of it quantizer |",
        "|---" * (2 * len(SNRS) + 8) + "|",
    ]
    for (data, model), conditions in places.items():
        peer = conditions.get(PEER, {})
        for name in sorted(conditions, key=lambda name: (name == PEER, name)):
            runs = conditions[name]
            cells = [data, model, name, str(len(runs))]
            for key in SNRS:
                cells.append(spread(np.array([run[key] for run in runs.values()])))
                cells.append("" if name == PEER else spread(leads(runs, peer, key), sign=True))
            for key, (unit, shown) in OTHERS_SHOWN.items():
                mean = np.mean([run[key] for run in runs.values()]) / unit
                cells.append("–" if np.isnan(mean) else f"{mean:{shown}}")
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def verdicts(places: Places, condition: str) -> str:
    """Whether a condition is ahead of the peer on each SNR by more than the spread of seeds."""
    rows = [
        f"| {condition} over {PEER} | " + " | ".join(SNRS.values()) + " | time of a step |",
        "|---" * (len(SNRS) + 2) + "|",
    ]
    for (data, model), conditions in places.items():
        if condition not in conditions or PEER not in conditions:
            continue
        own, peer = conditions[condition], conditions[PEER]
        cells = [f"{data}, {model}"]
        for key in SNRS:
            lead = leads(own, peer, key)
            cells.append(f"{spread(lead, sign=True)} {_word(lead)}")
        ms = [np.mean([run["ms_step"] for run in runs.values()]) for runs in (own, peer)]
        rows.append("| " + " | ".join([*cells, f"× {ms[0] / ms[1]:.2f}"]) + " |")
    return "\n".join(rows)


def _word(lead: np.ndarray) -> str:
    """A verdict on leads of several seeds; of one seed alone none but that it is one."""
    if len(lead) < 2:
        return "(one seed)"
    if lead.mean() > lead.std(ddof=1):
        return "ahead"
    return "ahead, within the spread" if lead.mean() > 0 else "behind"


def tried(places: Places) -> str:
    """Settings tried on validation parts: mean lead over the peer, best first."""
    names = {name for conditions in places.values() for name in conditions} - {PEER}
    found = []
    for name in names:
        have = [c for c in places.values() if name in c and PEER in c]
        each = {key: [leads(c[name], c[PEER], key).mean() for c in have] for key in SNRS}
        if have:
            found.append((float(np.mean(list(each.values()))), name, len(have), each))
    rows = [
        "| setting | places | " + " | ".join(SNRS.values()) + " | mean lead (dB) |",
        "|---" * (len(SNRS) + 3) + "|",
    ]
    for score, name, count, each in sorted(found, reverse=True):
        cells = [f"{np.mean(values):+.3f}" for values in each.values()]
        rows.append("| " + " | ".join([name, str(count), *cells, f"{score:+.3f}"]) + " |")
    return "\n".join(rows)


def write_everywhere(lines: list[dict[str, Any]], docs: Path) -> None:
    """Put the tables between their markers in RESULTS.md."""
    parts = []
    held, validation = places_of(lines, "held"), places_of(lines, "validation")
    if held:
        parts += [verdicts(held, "default"), table(held)]
    if validation:
        parts += ["Tried on validation parts:", tried(validation)]
    path = docs / "RESULTS.md"
    before, _, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    body = "\n\n".join(parts)
    path.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}")
