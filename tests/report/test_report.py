import html
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from b2t.config import Config
from b2t.errors import UserError
from b2t.records import JsonlSink
from b2t.report import figures
from b2t.report.advice import advise, with_settings
from b2t.report.page import PAGE
from b2t.report.run_data import RunData, load_run
from b2t.report.summary import summarize, try_write_report, write_report

LAYERS, CODES = 4, 64
EVERY_PLOT = {
    "utilization",
    "perplexity",
    "usage",
    "losses",
    "loss_shares",
    "gradients",
    "learning_rates",
    "loss_scale",
    "snr",
    "movement",
    "decoding",
    "traces",
    "spectra",
    "sizing",
}


def record(step, used=0.97, norm=1.2):
    layers = {f"codebook/utilization/{q}": used - 0.01 * q for q in range(LAYERS)}
    layers |= {f"codebook/perplexity/{q}": 0.8 * used * CODES for q in range(LAYERS)}
    return {
        "step": step,
        "phase": "tokenizer" if step <= 150 else "joint",
        "time_s": step * 0.4,
        "loss/total": 3 / math.sqrt(step),
        "loss/reconstruction": 1 / math.sqrt(step),
        "loss/commitment": 0.2 / math.sqrt(step),
        "loss_share/reconstruction": 0.8,
        "loss_share/commitment": 0.2,
        "loss/vq_ratio": 0.2,
        "optim/grad_norm": norm,
        "optim/grad_norm/encoder": norm / 2,
        "optim/lr/encoder": 1e-3 / step,
        "optim/loss_scale": 65536.0,
        "optim/skipped_steps": step // 100,
        "reconstruction/snr_db": 6.0 + step / 100,
        "ema/movement": 0.01,
        "ema/revived_per_step": 2.0,
        "codebook/utilization_worst": used - 0.03,
        "codebook/perplexity_worst_fraction": 0.8 * used,
        "codebook/dead": 1 - used,
        **layers,
    }


def save_run(folder, steps=(), alerts=(), evaluated=True, **values):
    folder.mkdir(parents=True)
    phases = [{"name": "tokenizer", "steps": 150}, {"name": "joint", "steps": 150}]
    config = Config.model_validate({"phases": phases})
    config.model.quantizer.codebook_size = CODES
    (folder / "config.yaml").write_text(config.to_yaml())
    sink = JsonlSink(folder / "metrics.jsonl")
    for step in steps:
        sink.write(record(step, **values))
        if step % 100 == 0:
            sink.write({"step": step, "phase": "joint", "val/wer": 0.5, "val/per": 0.2})
    for alert in alerts:
        sink.write({"step": 120, "phase": "tokenizer", "alert": alert})
    sink.close()
    if evaluated:
        save_evaluation(folder)
    return folder


def save_evaluation(folder):
    scores = {"wer": 0.27, "wer_noise": 0.97, "wer_interval": [0.2, 0.3], "wer_shuffled": 0.9}
    use = {"utilization": [0.9] * LAYERS, "perplexity": [50.0] * LAYERS, "codebook_size": CODES}
    scores |= {"rows": 30, "known_sentences": 0.25, "notes": ["the val split chose <it>"]}
    scores |= {"split": "val", "simulated": True, "distinct_ratio": 0.95, **use}
    (folder / "evaluation.json").write_text(json.dumps(scores))
    with (folder / "predictions.jsonl").open("w") as file:
        for i in range(30):
            said = {"target": f"sentence <{i}>", "prediction": "<script>alert(1)</script>"}
            file.write(json.dumps({"row": f"day/1/{i}", **said}) + "\n")
    counts = np.random.default_rng(0).integers(20, 90, (LAYERS, CODES)).tolist()
    (folder / "codebook_usage.json").write_text(json.dumps({"counts": counts}))
    wave = np.sin(np.arange(100) / 5)[None].repeat(2, 0).tolist()
    trial = {"row": "a", "channels": [3, 5], "target": wave, "reconstruction": wave}
    line = [1.0, 2.0, 3.0]
    spectrum = {"hz": line, "target": line, "reconstruction": line}
    traces = {"sampling_rate": 50.0, "trials": [trial], "spectrum": spectrum}
    (folder / "reconstruction.json").write_text(json.dumps(traces))


ALERT = {
    "severity": "critical",
    "message": "a quantizer layer uses 1.0 % of its codes",
    "cause": "collapse",
    "remedy": "lower the learning rate",
}
STEPS = range(10, 301, 10)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    found = {
        "healthy": save_run(root / "healthy", STEPS),
        "collapsed": save_run(root / "collapsed", range(10, 130, 10), [ALERT], used=0.04),
        "crashed": save_run(root / "crashed", range(10, 80, 10), evaluated=False),
        "empty": save_run(root / "empty", evaluated=False),
    }
    with (found["crashed"] / "metrics.jsonl").open("a") as file:
        file.write('not json\n{"step": 80, "loss/tot')
    for folder in found.values():
        write_report([folder])
    found["compared"] = root / "compared"
    write_report([found["healthy"], found["collapsed"]], found["compared"] / "report")
    return found


class Page(HTMLParser):
    """Collects addresses, tags and ids of a page."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.tags, self.figures = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "action")
        self.addresses += [v for k, v in attrs if k in names]
        if tag == "figure":
            self.figures.append(dict(attrs)["id"])


def test_a_full_run_has_every_figure_on_the_page_and_as_png(runs):
    folder = runs["healthy"] / "report"
    page = Page((folder / "report.html").read_text())
    assert set(page.figures) == EVERY_PLOT
    assert {p.stem for p in folder.glob("*.png")} == EVERY_PLOT
    assert page.tags.count("svg") == len(EVERY_PLOT)


@pytest.mark.parametrize("name", ["healthy", "collapsed", "crashed", "empty"])
def test_the_page_needs_nothing_from_elsewhere_and_runs_no_script(runs, name):
    text = (runs[name] / "report" / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" in page.tags
    outside = [a for a in page.addresses if not a.startswith(("#", "data:"))]
    assert outside == []
    assert not re.search(r"url\((?!#|&#35;)", text) and "@import" not in text


def test_what_the_model_said_is_shown_as_text(runs):
    text = (runs["healthy"] / "report" / "report.html").read_text()
    assert html.escape("<script>alert(1)</script>") in text
    assert "Split val, 30 trials, 25.0 % of the target sentences occur in training." in text
    assert "The val split chose &lt;it&gt;." in text
    assert "sentence &lt;0&gt;" in text


def test_verdicts(runs):
    assert summarize(load_run(runs["healthy"])).verdict == "healthy"
    collapsed = summarize(load_run(runs["collapsed"]))
    assert collapsed.verdict == "critical"
    assert any("1.0 % of its codes" in reason for reason in collapsed.reasons)
    assert summarize(load_run(runs["empty"])).verdict == "unknown"
    assert "finished: 300 steps" in summarize(load_run(runs["healthy"])).state
    assert "step 70 of 300" in summarize(load_run(runs["crashed"])).state


def test_a_run_that_went_on_after_a_critical_alert_is_judged_by_what_it_is_now(tmp_path):
    folder = save_run(tmp_path / "run", STEPS, [ALERT])
    summary = summarize(load_run(folder))
    assert summary.verdict == "healthy" and summary.reasons == []
    assert [alert["message"] for alert in summary.alerts] == [ALERT["message"]]


@pytest.mark.parametrize(
    ("status", "silent_s", "verdict", "said"),
    [
        ("running", 2, "healthy", "step 70 of 300 in phase tokenizer after 28 s: under way"),
        ("running", 4000, "concerning", "after 28 s: killed or hung"),
        ("crashed: OSError: disk full", 4000, "critical", "after 28 s: crashed"),
        ("failed: loss is nan", 2, "critical", "after 28 s: failed"),
        ("stopped on request", 4000, "healthy", "the same command goes on"),
        ("finished", 4000, "healthy", "finished: 70 steps after 28 s"),
    ],
)
def test_how_a_run_ended(tmp_path, status, silent_s, verdict, said):
    folder = save_run(tmp_path / "run", range(10, 80, 10))
    (folder / "status.json").write_text(json.dumps({"state": status, "step": 70}))
    then = time.time() - silent_s
    os.utime(folder / "metrics.jsonl", (then, then))
    summary = summarize(load_run(folder))
    assert summary.verdict == verdict and said in summary.state
    told = "Nothing was written for 1 h 06 min" in " ".join(summary.reasons)
    assert told == (verdict == "concerning")
    reason = status.partition(": ")[2]
    assert bool(reason) == any(reason and reason in text for text in summary.reasons)


def test_a_run_is_not_called_dead_for_a_silence_that_is_its_habit():
    steps = [{"step": n, "time_s": 1000.0 * n} for n in range(1, 5)]
    assert not RunData(Path("run"), steps=steps, silent_s=4500.0).quiet
    assert RunData(Path("run"), steps=steps, silent_s=5500.0).quiet


def test_report_json_is_strict_and_names_the_rows(runs):
    record = json.loads((runs["collapsed"] / "report" / "report.json").read_text())
    (run,) = record["runs"]
    assert run["verdict"] == "critical" and run["alerts"][0]["severity"] == "critical"
    grades = {row["metric"]: row["grade"] for row in run["rows"]}
    assert grades["codebook/utilization_worst"] == "critical"
    assert grades["optim/grad_norm"] == "healthy"
    assert run["advice"] and run["advice"][0]["remedy"]


def test_unreadable_lines_are_counted_and_left_out(runs):
    run = load_run(runs["crashed"])
    assert len(run.steps) == 7
    assert run.problems == ["metrics.jsonl: 2 unreadable lines left out (line 8, 9)"]


def test_a_run_on_a_simulation_says_so_before_any_evaluation(tmp_path):
    folder = save_run(tmp_path / "run", STEPS, evaluated=False)
    assert not load_run(folder).simulated
    best = folder / "checkpoints" / "best"
    best.mkdir(parents=True)
    (best / "config.json").write_text('{"simulated_data": true}')
    assert "SIMULATED DATA" in write_report([folder]).read_text()


def test_damaged_files_beside_do_not_stop_the_report(tmp_path):
    folder = save_run(tmp_path / "run", STEPS)
    for name in ("evaluation.json", "codebook_usage.json", "reconstruction.json"):
        (folder / name).write_text('{"counts": [[1, 2], [3')
    (folder / "config.yaml").write_text("phases: [\n")
    (folder / "predictions.jsonl").write_text("[]\n")
    assert write_report([folder]).is_file()
    assert len(load_run(folder).problems) == 5
    (folder / "status.json").write_text("[1]")
    assert "status.json is left out, as it holds no object" in load_run(folder).problems


def test_a_metric_that_is_not_finite_is_critical(tmp_path):
    folder = save_run(tmp_path / "run", range(10, 50, 10))
    sink = JsonlSink(folder / "metrics.jsonl")
    sink.write({**record(50), "optim/grad_norm": math.inf})
    assert summarize(load_run(folder)).verdict == "critical"
    write_report([folder])


def test_several_runs_share_axes(runs, tmp_path):
    page = write_report([runs["healthy"], runs["collapsed"], runs["empty"]], tmp_path / "out")
    text = page.read_text()
    assert "compare_loss_total" in Page(text).figures
    assert len(re.findall('class="verdict', text)) == 3
    legend = text[text.index('id="compare_loss_total"') :]
    assert "healthy" in legend and "collapsed" in legend


def test_settings_that_differ_between_runs_are_listed(runs, tmp_path):
    other = save_run(tmp_path / "other", STEPS)
    text = (
        (other / "config.yaml").read_text().replace(f"codebook_size: {CODES}", "codebook_size: 9")
    )
    (other / "config.yaml").write_text(text)
    page = write_report([runs["healthy"], other], tmp_path / "out").read_text()
    table = page[page.index("Settings that differ") :]
    assert re.findall(r'class="label">([^<]+)<', table[: table.index("</table>")]) == [
        "model.quantizer.codebook_size"
    ]


def test_no_line_crosses_a_phase_that_freezes_its_component():
    frozen = range(50, 90, 10)
    steps = [
        {
            "step": step,
            "phase": "middle" if step in frozen else "other",
            "optim/lr/signal_decoder": 1e-3 / step,
            "optim/lr/quantizer": 1e-3 / step,
            **({} if step in frozen else {"optim/lr/encoder": 1e-3 / step}),
        }
        for step in range(10, 130, 10)
    ]
    axes = Figure().subplots()
    figures.training.draw_learning_rates(axes, RunData(Path("run"), steps=steps))
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    whole, broken = lines["quantizer, signal_decoder"], lines["encoder"]
    assert np.isfinite(whole).all() and len(whole) == 12
    pairs = itertools.pairwise(broken)
    assert not [a for a, b in pairs if a[0] <= 50 <= b[0] and np.isfinite([a, b]).all()]
    assert np.isfinite(broken[:, 1]).sum() == 8


def test_smoothing_does_not_reach_into_another_phase():
    steps = [
        {"step": n, "phase": "a" if n <= 40 else "b", "loss/total": 1.0 if n <= 40 else 9.0}
        for n in range(1, 81)
    ]
    run = RunData(Path("run"), steps=steps)
    _, smooth = figures.training._smooth_by_phase(run, *run.series("loss/total"))
    assert set(np.array(smooth)[np.isfinite(smooth)]) == {1.0, 9.0}


def contrast(one, other):
    """Contrast ratio of WCAG 2."""

    def luminance(colour):
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(to_rgb(one)), luminance(to_rgb(other))))
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_on_the_light_and_on_the_dark_page():
    cards = re.findall(r"--card: (#\w+)", PAGE)
    assert len(cards) == 2 and contrast(*cards) > 10
    layers = [figures.axes.pick_colour(index, 16)[:3] for index in range(16)]
    for colour in (*figures.COLOURS, *figures.SEVERITY.values(), *layers):
        assert min(contrast(colour, card) for card in cards) >= 3
    for name in ("ink", "faint", "healthy", "concerning", "critical"):
        for text, card in zip(re.findall(rf"--{name}: (#\w+)", PAGE), cards, strict=True):
            assert contrast(text, card) >= 4.5, name


def test_a_stale_figure_does_not_survive(runs, tmp_path):
    folder = save_run(tmp_path / "run", STEPS)
    write_report([folder])
    (folder / "reconstruction.json").unlink()
    write_report([folder])
    assert not (folder / "report" / "traces.png").exists()


def test_folders_that_are_no_run_are_named(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"neither config\.yaml nor metrics\.jsonl"):
        write_report([tmp_path])


def test_a_report_that_fails_does_not_break_the_end_of_a_run(tmp_path, caplog):
    assert try_write_report(tmp_path / "nowhere") is None
    assert "b2t report" in caplog.text
    folder = save_run(tmp_path / "run", STEPS)
    (folder / "report").write_text("in the way")
    assert try_write_report(folder) is None
    (folder / "report").unlink()
    assert try_write_report(folder).is_file()


def test_advice_follows_the_debugging_guide(tmp_path):
    folder = save_run(tmp_path / "run", STEPS, norm=30.0)
    scores = {"wer": 0.95, "wer_noise": 0.97, "distinct_ratio": 0.01}
    (folder / "evaluation.json").write_text(json.dumps(scores))
    symptoms = " | ".join(advice.symptom for advice in advise(load_run(folder)))
    assert "gradient norm" in symptoms and "hardly better" in symptoms
    assert "distinct outputs" in symptoms
    healthy = save_run(tmp_path / "healthy", STEPS)
    assert [a.symptom.split(":")[0] for a in advise(load_run(healthy))] == ["reconstruction SNR"]


def test_advice_on_a_collapse_names_keys_with_their_values(tmp_path):
    folder = save_run(tmp_path / "run", range(10, 130, 10), [ALERT], used=0.04, norm=30.0)
    text = (folder / "config.yaml").read_text().replace("revival: true", "revival: false")
    (folder / "config.yaml").write_text(text)
    advice = advise(load_run(folder))
    assert advice[0].remedy == "phases.0.revival=true"
    lr = Config().phases[0].lr
    crowded = next(a for a in advice if "crowd" in a.symptom)
    assert f"lower phases.0.lr (now {lr:g})" in crowded.remedy
    assert any("gradient norms above 10" in a.symptom for a in advice)
    assert with_settings("x; phases.*.revival=true", load_run(folder)) == "x; phases.0.revival=true"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("healthy", 1400),
        ("healthy", 420),
        ("collapsed", 420),
        ("crashed", 1400),
        ("empty", 420),
        ("compared", 420),
    ],
)
def test_a_browser_draws_every_figure_without_errors_or_overflow(runs, tmp_path, name, width):
    text = (runs[name] / "report" / "report.html").read_text()
    expected = len(Page(text).figures)
    probe = f"""<!doctype html><body style="margin:0">
<iframe style="border:0;width:{width}px;height:3000px" srcdoc="{html.escape(text)}"></iframe>
<p id="found"></p><script>
document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument;
  const boxes = [...page.querySelectorAll("figure svg")].map(s => s.getBoundingClientRect());
  const sizes = [...page.querySelectorAll("figure svg text")].map(t => {{
    const svg = t.ownerSVGElement;
    const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    return t.textContent.trim() ? scale * parseFloat(getComputedStyle(t).fontSize) : 99; }});
  const drawn = boxes.filter(b => b.width > 200 && b.height > 100 && b.right <= {width}).length;
  const smallest = Math.floor(10 * Math.min(99, ...sizes));
  found.textContent = [drawn, page.documentElement.scrollWidth, smallest].join(" ");
}};</script>"""
    (tmp_path / "probe.html").write_text(probe)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000"]
    shown = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", (tmp_path / "probe.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    drawn, wide, smallest = re.search(r'id="found">(\d+) (\d+) (\d+)<', shown.stdout).groups()
    assert int(drawn) == expected
    assert int(wide) <= width, "the page scrolls sideways"
    assert int(smallest) >= 80, "letters of less than 8 pixels"
    assert "CONSOLE" not in shown.stderr
