import io

import pytest
from rich.console import Console

from b2t.evaluate.results import Evaluation, Prediction
from b2t.evaluate.table import print_evaluation


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_digit_of_a_rate_is_lost_on_a_narrow_terminal(width):
    controls = {name: {"wer_lm": 1.163} for name in ("spectrum", "codes", "lm_alone")}
    result = Evaluation(
        "test", wer_lm=0.674, wer_lm_interval=(0.6, 1.023), wer_lm_noise=0.977,
        wer_lm_shuffled=0.948, controls=controls,
    )  # fmt: skip
    shown = io.StringIO()
    print_evaluation(result, "run", Console(file=shown, width=width))
    rows = [line.split("│")[1:-1] for line in shown.getvalue().splitlines() if "│" in line]
    cells = ["".join("".join(parts).split()) for parts in zip(*rows, strict=True)]
    expected = ["67.4%", "60.0%–102.3%", "97.7%", "116.3%", "116.3%", "94.8%", "116.3%"]
    assert cells[1:] == expected
    assert "…" not in shown.getvalue()


def test_texts_stand_beside_what_they_are_also_where_they_take_two_lines():
    said = Prediction(
        "day/1/0", "day", target="one " * 30 + "end", prediction="two", noise_prediction="x" * 2000
    )
    shown = io.StringIO()
    result = Evaluation("test", wer=0.5, predictions=[said])
    print_evaluation(result, "run", Console(file=shown, width=80))
    lines = shown.getvalue().split("Target and output")[1].splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    beside = {kind: text for _, kind, text in cells if kind}
    assert beside["target"].startswith("one one") and beside["output"] == "two"
    assert set(beside["of noise"]) == {"x"}
    assert sum(text.count("x") for *_, text in cells) < 250, "who repeats itself is cut"
