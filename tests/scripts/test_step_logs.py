"""What is printed of the logs of a step."""

import pytest

from tests.script_modules import script


@pytest.fixture
def logs(repository):
    with script(repository, "step_logs") as module:
        yield module


def test_checks_that_failed_are_named_also_where_pytest_was_cut_off(logs):
    cut = (
        "[gw1] [  2%] PASSED tests/a.py::test_fine\n"
        "[gw0] [  3%] FAILED tests/a.py::test_b[3-4]\n"
        "tests/a.py::test_alone FAILED    [ 10%]\n"
    )
    assert logs.failing(cut) == ["tests/a.py::test_b[3-4]", "tests/a.py::test_alone"]
    whole = cut + "FAILED tests/a.py::test_b[3-4] - assert 1 == 2\nERROR tests/c.py\n1 failed\n"
    assert logs.failing(whole) == [
        "tests/a.py::test_b[3-4] - assert 1 == 2", "tests/a.py::test_alone", "tests/c.py",
    ]  # fmt: skip


def test_the_benchmark_is_told_as_far_as_it_came(logs, repository, tmp_path):
    with script(repository, "bench_kernels") as bench:
        result = bench.Result("usage", "ours", 32.4, host=3.7, longest=290.0, stalls="1 wait")
        rows = bench.table([result, bench.Result("usage", "theirs", 1.3)])
    (tmp_path / "bench.log").write_text(f"$ command\n{rows}\n- goal: 3.1 (missed)\n| half a row")
    assert logs.told(tmp_path, "bench", True) == [
        "usage: ours: ms 32.400, host 3.700, longest 290.000 (1 wait)",
        "usage: theirs: ms 1.300",
        "- goal: 3.1 (missed)",
    ]


def test_a_step_is_compared_with_one_graph_of_it(repository):
    with script(repository, "bench_kernels") as bench:
        goal = bench.Goal("step over its graph", "q", "step", "step", 1, of_graph=True)
        report = bench.Report("GPU", 1, {}, results=[bench.Result("q", "step", 6.0)])
        assert goal.judge(report) == "- step over its graph: could not be captured"
        report.results[0].graph = 0.5
        assert goal.judge(report) == "- step over its graph: 12.000"


def test_of_what_failed_the_end_is_told(logs, tmp_path):
    (tmp_path / "resume.log").write_text("\n".join(map(str, range(50))))
    (tmp_path / "resume-alone.log").write_text("RuntimeError: no luck")
    assert logs.told(tmp_path, "resume", True) == []
    said = logs.told(tmp_path, "resume", False)
    assert "    RuntimeError: no luck" in said and "    49" in said and "    20" not in said
