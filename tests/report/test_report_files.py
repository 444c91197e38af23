"""What a report removes from the folder that it is written to."""

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
