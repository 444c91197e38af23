"""Whether a score says that a brain was decoded: it does where it beats every control."""

from b2t.evaluate.results import Evaluation

KINDS = {
    "per": "phonemes",
    "wer": "words",
    "wer_lm": "words by language model",
    "wer_joint": "words by joint scores",
}
"""Fields of an evaluation that are error rates, and what they are rates of."""

NAMES = {
    "noise": "noise",
    "spectrum": "noise of equal spectrum",
    "codes": "codes in another order",
    "shuffled": "another trial's signal",
    "lm_alone": "the language model without phonemes",
    "constant": "one sentence for every trial",
}

_CHANCE = 0.05


def control_rates(result: Evaluation, field: str) -> dict[str, float]:
    """Error rates of the controls of one decoder, by the keys of `NAMES`."""
    found = {name: getattr(result, f"{field}_{name}", None) for name in ("noise", "shuffled")}
    found |= {name: rates.get(field) for name, rates in result.controls.items()}
    if field.startswith("wer"):
        found["constant"] = result.prior.get("wer_constant")
    known = ((name, found.get(name)) for name in NAMES)
    return {name: rate for name, rate in known if rate is not None}


def unbeaten(result: Evaluation, field: str) -> list[str]:
    """Controls that a decoder does not beat; empty where it decodes, or where there are none.

    It beats a control where its whole 95 % interval lies below the control's error rate, and other
    trials where fewer than 5 % of random pairings are as good as the true one.

    Args:
        result: of one split.
        field: of `KINDS`.
    """
    rate, interval = getattr(result, field), getattr(result, f"{field}_interval")
    if rate is None or interval is None:
        return []
    rates = control_rates(result, field)
    failed = [NAMES[name] for name, other in rates.items() if interval[1] >= other]
    p = result.details.get(field, {}).get("p_permutation")
    if p is not None and p >= _CHANCE and NAMES["shuffled"] not in failed:
        failed.append(f"other trials (p = {p:.2g})")
    return failed


def verdict(result: Evaluation) -> str | None:
    """Return a line that says what is not decoded, None where all is that was scored."""
    failed = {name: unbeaten(result, field) for field, name in KINDS.items()}
    failed = {name: controls for name, controls in failed.items() if controls}
    if not failed:
        return None
    told = [f"{name} no better than {_listed(controls)}" for name, controls in failed.items()]
    return "NOT DECODING: " + "; ".join(told)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
