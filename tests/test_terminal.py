"""Terminals and pipes that are not UTF-8: everything is shown, and nothing ends in a traceback."""

import io
import sys

import pytest

from b2t import cli
from b2t.train import main as training


@pytest.fixture
def terminal(monkeypatch):
    """Puts streams of an encoding in the place of this process's; returns what they received."""

    def put(encoding: str):
        streams = [io.BytesIO(), io.BytesIO()]
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            wrapped = io.TextIOWrapper(stream, encoding=encoding, write_through=True)
            monkeypatch.setattr(sys, name, wrapped)
        return streams

    return put


@pytest.mark.parametrize(
    "encoding, shown",
    [
        ("ascii", [r"h\xf6rt -> das", r"0.00 - 100.00) * CER"]),
        ("latin-1", ["hört -> das", "0.00 - 100.00) · CER"]),
        ("utf-8", ["hört → das", "0.00 – 100.00) · CER"]),
    ],
)
def test_scores_are_shown_in_any_encoding(terminal, tmp_path, encoding, shown):
    (tmp_path / "said.txt").write_text("hört\nja\n", encoding="utf-8")
    (tmp_path / "heard.txt").write_text("das\nja\n", encoding="utf-8")
    out, _ = terminal(encoding)
    assert cli.main(["score", str(tmp_path / "said.txt"), str(tmp_path / "heard.txt")]) == 0
    text = out.getvalue().decode(encoding)
    for part in shown:
        assert part in text, text


def test_a_mistake_is_shown_though_its_file_has_a_name_of_other_signs(terminal, tmp_path):
    _, errors = terminal("ascii")
    assert cli.main(["inspect", str(tmp_path / "Ärzte")]) == 2
    assert "b2t inspect: error: " in errors.getvalue().decode("ascii")
    assert "\\xc4rzte" in errors.getvalue().decode("ascii")


def test_bytes_of_a_name_that_are_no_utf8_are_shown(terminal, tmp_path):
    _, errors = terminal("utf-8")
    assert cli.main(["inspect", str(tmp_path / "M\udcfcller")]) == 2
    assert "M\\udcfcller" in errors.getvalue().decode("utf-8")


def test_every_key_of_the_configuration_is_told_in_ascii(terminal):
    out, _ = terminal("ascii")
    assert training.main(["--help-config"]) == 0
    assert "stability.collective_timeout_s" in out.getvalue().decode("ascii")
