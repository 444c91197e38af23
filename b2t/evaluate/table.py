"""An evaluation as tables on a terminal."""

from rich.console import Console
from rich.table import Table

from b2t.counted import counted
from b2t.evaluate.results import Evaluation, Prediction
from b2t.evaluate.verdict import KINDS, control_rates, verdict

SIMULATED = "SIMULATED DATA: recordings of `b2t simulate`, not of a brain"


def print_evaluation(
    result: Evaluation, title: str, console: Console | None = None, examples: int = 10
) -> None:
    """Print metrics, controls, codebook use and ``examples`` pairs of target and output."""
    console = console or Console()
    line = verdict(result)
    if line is not None:
        console.print(line, style="bold red", markup=False)
    if result.simulated:
        console.print(SIMULATED, style="bold yellow")
    seen = f"{counted(result.rows, 'trial')} · {counted(result.frames, 'frame')}"
    console.print(f"{heading(title, result)} · {seen}")
    if any(rate is not None for rate in (result.per, result.wer, result.wer_lm)):
        console.print(_rates(result))
    facts = _facts(result)
    if facts:
        console.print("\n".join(facts))
    if result.utilization:
        console.print(_usage(result))
    for note in result.notes:
        console.print(f"note: {note}", markup=False)
    chosen = choose_examples(result.predictions, examples)
    if chosen:
        console.print(_pairs(chosen))


def heading(title: str, result: Evaluation) -> str:
    """Name what was evaluated: the run, the checkpoint unless it is the best, and the split."""
    parts = [title, result.split]
    if result.checkpoint not in (None, "best"):
        parts.insert(1, str(result.checkpoint))
    return " · ".join(parts) + (f" ({result.role})" if result.role else "")


def choose_examples(predictions: list[Prediction], number: int) -> list[Prediction]:
    """Choose rows with text at equal distances, so that nothing about them was selected."""
    with_text = [
        p
        for p in predictions
        if p.target is not None and (p.prediction is not None or p.lm_prediction is not None)
    ]
    if len(with_text) <= number:
        return with_text
    return [with_text[i * len(with_text) // number] for i in range(number)]


_COLUMNS = {
    "noise": "noise",
    "spectrum": "spectrum",
    "codes": "codes",
    "shuffled": "shuffled",
    "lm_alone": "LM alone",
}
"""Headings of the controls of `b2t.evaluate.verdict.NAMES` that stand in the table."""


def _rates(result: Evaluation) -> Table:
    table = Table(title="Error rates, lower is better", title_justify="left")
    rows = {
        "phonemes (PER)": "per",
        "characters (CER)": "cer",
        "words (WER)": "wer",
        "words by language model": "wer_lm",
        "words by joint scores": "wer_joint",
    }
    controls = {name: control_rates(result, field) for name, field in rows.items()}
    shown = [c for c in _COLUMNS if any(c in rates for rates in controls.values())]
    table.add_column("", no_wrap=True)
    for heading in ("model", "95 % interval", *(_COLUMNS[c] for c in shown)):
        # Folded, not cut: no digit is lost on a narrow terminal.
        table.add_column(heading, justify="right", overflow="fold")
    for name, field in rows.items():
        rate, interval = getattr(result, field), getattr(result, f"{field}_interval")
        if rate is None:
            continue
        component = "text_decoder" if field in ("cer", "wer") else "phoneme_head"
        label = f"{name}, untrained" if component in result.untrained else name
        span = f"{_percent(interval[0])} – {_percent(interval[1])}" if interval else ""
        others = (_percent(controls[name].get(control)) for control in shown)
        table.add_row(label, _percent(rate), span, *others)
    return table


def _facts(result: Evaluation) -> list[str]:
    facts = []
    if result.wer is not None:
        facts.append(
            f"distinct outputs / distinct targets {_number(result.distinct_ratio)} "
            f"(noise {_number(result.distinct_ratio_noise)}) · sentences without an error "
            f"{_percent(result.exact)}"
        )
        if result.known_sentences is not None:
            facts.append(
                f"target sentences that occur in training {_percent(result.known_sentences)}"
            )
        facts.append(
            f"BLEU {_number(result.bleu, 1)} · ROUGE-1 {_number(result.rouge1, 1)} · "
            f"ROUGE-2 {_number(result.rouge2, 1)} · ROUGE-L {_number(result.rougeL, 1)}"
        )
    facts += _errors(result)
    if result.mse is not None and "signal_decoder" not in result.untrained:
        facts.append(
            f"reconstruction SNR {_number(result.snr_db)} dB pooled, "
            f"{_number(result.snr_median_db)} dB median trial · cosine {_number(result.cosine)}"
        )
    return facts


def _errors(result: Evaluation) -> list[str]:
    """Kinds of errors of each decoder, what was confused, and what no brain would say."""
    found = []
    for field, name in KINDS.items():
        kinds = result.details.get(field)
        if not kinds:
            continue
        units = max(kinds["hits"] + kinds["substitutions"] + kinds["deletions"], 1)
        line = f"{name}: " + ", ".join(
            f"{_percent(kinds[kind] / units)} {kind}"
            for kind in ("substitutions", "deletions", "insertions")
        )
        confused = ", ".join(
            f"{_short(a, 20)} → {_short(b, 20)}" for a, b, _ in kinds["confused"][:5]
        )
        found.append(line + (f" · most confused {confused}" if confused else ""))
        rates = [some["rate"] for some in kinds["by_session"].values() if some["rate"] is not None]
        if len(rates) > 1:
            found[-1] += f" · sessions {_percent(min(rates))} – {_percent(max(rates))}"
    if result.prior:
        prior = result.prior
        found.append(
            f"WER without a brain: most frequent sentence {_percent(prior['wer_most_frequent'])}, "
            f"best constant sentence {_percent(prior['wer_constant'])}, random training sentences "
            f"{_percent(prior['wer_random'])}"
        )
    if result.words_per_minute is not None:
        found.append(f"{result.words_per_minute:.0f} words per minute in these trials")
    return found


def _usage(result: Evaluation) -> Table:
    size = result.codebook_size or 0
    table = Table(title=f"Codebooks of {size:,} codes on this split", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("used", justify="right")
    table.add_column("perplexity", justify="right")
    table.add_column("of uniform", justify="right")
    for layer, (used, perplexity) in enumerate(
        zip(result.utilization, result.perplexity, strict=True)
    ):
        table.add_row(
            str(layer), _percent(used), _number(perplexity, 1), _percent(perplexity / size)
        )
    return table


def _pairs(predictions: list[Prediction]) -> Table:
    table = Table(title="Target and output", title_justify="left")
    table.add_column("trial", overflow="fold")
    table.add_column("")
    table.add_column("text", overflow="fold")
    for p in predictions:
        said = {
            "target": p.target,
            "output": p.prediction,
            "of noise": p.noise_prediction,
            "by language model": p.lm_prediction,
            "of noise by it": p.lm_noise_prediction,
            "by joint scores": p.joint_prediction,
            "of noise by them": p.joint_noise_prediction,
        }
        row = _plain(p.row)
        for kind, text in said.items():
            if text is not None:
                table.add_row(row, kind, _plain(_short(text, 240)))
                row = ""
        table.add_section()
    return table


def _short(text: str, most: int) -> str:
    """Begin a text: models that have not learnt to stop repeat themselves to the end."""
    return text if len(text) <= most else f"{text[: most - 2]} …"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
