"""What a report removes from its folder, and what it leaves out."""

import json

from b2t.report.summary import write_report
from tests.report.test_report import STEPS, save_run


def test_figures_of_others_stay(tmp_path):
    """The folder may be one of the user's, with files of any name, and with a report of before."""
    folder, out = save_run(tmp_path / "run", STEPS), tmp_path / "out"
    out.mkdir()
    others = [out / "holiday.png", tmp_path / "outside.png"]
    for other in others:
        other.write_bytes(b"mine")
    for listed in ("{", "[]", '{"figures": ["../outside.png", 3, "report.html"]}'):
        (out / "report.json").write_text(listed)
        write_report([folder], out)
        assert [other.read_bytes() for other in others] == [b"mine"] * 2
        assert (out / "losses.png").is_file() and (out / "report.html").is_file()


def test_no_picture_is_drawn_of_what_nothing_has_trained_or_moved(tmp_path):
    """As of a text decoder on top of a finished model of phonemes: codes rest."""
    run = save_run(tmp_path / "run")
    file = run / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"untrained": ["signal_decoder"]}))
    rested = [{"step": step, "phase": "joint", "codebook/revived": 0} for step in (10, 20)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rested))
    write_report([run])
    drawn = {file.stem for file in (run / "report").glob("*.png")}
    assert "usage" in drawn and not drawn & {"traces", "spectra", "movement"}
