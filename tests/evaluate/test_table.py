import io

import pytest
from rich.console import Console

from b2t.evaluate.results import Evaluation
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
