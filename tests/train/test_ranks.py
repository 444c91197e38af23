"""How a rank joins: which tools DeepSpeed finds to compile its operators."""

import os
import shutil
import sys
from pathlib import Path

from b2t.train import ranks


def test_the_ninja_of_this_environment_comes_first(monkeypatch, tmp_path):
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ninja") == str(other)
    ranks._prefer_own_tools()
    own = str(Path(sys.executable).parent)
    assert os.environ["PATH"].split(os.pathsep) == [own, str(tmp_path)]
    ranks._prefer_own_tools()
    assert os.environ["PATH"].count(own) == 1, "once is enough"


def test_joining_prefers_it(one_rank):
    assert shutil.which("ninja") == str(Path(sys.executable).parent / "ninja")
