"""Real compilation, without a GPU: what every configuration takes on each chip."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.script_modules import script

FLAGSHIP = ["--kernel", "scan_kernel", "--width", "256"]


def compile_reports(repository, tmp_path, *options):
    script = repository / "scripts" / "kernel_resources.py"
    written = tmp_path / "reports.json"
    finished = subprocess.run(
        [sys.executable, str(script), "--json", str(written), *options],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(written.read_text())


def check(reports):
    for report in reports:
        place = {name: report[name] for name in ("kernel", "variant", "architecture", "D", "tile")}
        assert report["local_memory_instructions"] == 0, place
        assert report["shared"] <= report["shared_limit"], place
        products = report["variant"] != "(no products)"
        assert report["tensor_core"].startswith(("HMMA", "HGMMA")) == products, place


def test_the_search_at_the_default_width(repository, tmp_path):
    """No spills, tensor cores in the loop, and little else: the index costs no exchange."""
    reports = compile_reports(repository, tmp_path, *FLAGSHIP)
    check(reports)
    assert {report["architecture"] for report in reports} == {80, 86, 90}
    for report in reports:
        if report["architecture"] == 90:
            assert report["tensor_core"].startswith("HGMMA")
        assert report["classes"]["shuffle"] == 0, report
        assert report["classes"]["maximum"] > 0.8, report
        most = {"fast": 2.5, "exact": 2.75, "exact, soft": 6.8, "draw": 17.5}
        assert report["epilogue_per_score"] <= most[report["variant"]]


def test_the_other_kernels_on_the_default_chip(repository, tmp_path):
    from b2t_kernels import tuning

    others = sorted((tuning.KERNELS.keys() | tuning.PLAIN_KERNELS.keys()) - {"scan_kernel"})
    options = ["--arch", "86", "--width", "256"]
    reports = compile_reports(repository, tmp_path, "--kernel", *others, *options)
    check(reports)
    assert {report["kernel"] for report in reports} == set(others)


@pytest.mark.slow
def test_every_configuration(repository, tmp_path):
    check(compile_reports(repository, tmp_path))


def test_the_report_finds_what_is_wrong(repository):
    """A loop is found by its branch, and a spill, an overrun or a lost tensor core is named."""
    with script(repository, "kernel_resources") as module:
        check_report(module)


def check_report(module):
    code = [
        "MOV R1, R2 @0000",
        "HMMA.16816.F32 R4, R4, R8, R4 @0010",
        "FMNMX R1, R2, R3, !PT @0020",
        "BRA 0x10 @0030",
        "EXIT @0040",
    ]
    assert module.inner_loop(code) == code[1:4]
    assert module.inner_loop([code[0], *code[2:]]) == []
    assert module._macs(code[1], warps=8) == 8 * 16 * 8 * 16
    assert module._macs("HGMMA.64x128x16.F32 R24 @0", warps=8) == 2 * 64 * 128 * 16
    assert module._shared_bytes("LDSM.16.MT88.4 R4, [R2] @0") == 512
    assert module._shared_bytes("LDGSTS.E.BYPASS.128 [R1], [R2.64] @0") == 512
    assert module._shared_bytes("STS [R1], R2 @0") == 128
    assert module._shared_bytes("LDG.E R1, [R2.64] @0") == 0
    fine = module.Report(
        "k", "", 86, 256, "t", 8, 2, 128, 0, 0, 101_376, 101_376, "HMMA", 1.0, 1.0, 1.0, 0, {}
    )
    assert fine.problems() == []
    assert replace(fine, stack=8).problems() == []
    assert "spills" in replace(fine, local_memory_instructions=1).problems()[0]
    assert "shared memory" in replace(fine, shared=101_377).problems()[0]
    assert "tensor-core" in replace(fine, tensor_core="").problems()[0]


def fused_after_a_shuffle(code):
    """Instructions that multiply and add to a register which another lane sent."""
    sent, found = {}, []
    for line in code:
        operation, *registers = re.findall(r"[\w.]+", line.split("@")[0])
        registers = [each for each in registers if re.fullmatch(r"R\d+", each)]
        if operation.startswith(("FFMA", "DFMA")) and set(registers[1:]) & sent.keys():
            found.append(line)
        for register in registers[:1]:
            sent.pop(register, None)
        if operation.startswith("SHFL"):
            sent[registers[0]] = line
    return found


@pytest.mark.parametrize("kernel", ["candidates_kernel", "winners_kernel"])
def test_lanes_agree_on_the_sums_that_beams_compare(repository, kernel):
    """A fused product of the lane's own would make a sum differ from lane to lane."""
    with script(repository, "kernel_resources") as module:
        job = next(module.jobs({kernel}, {90}, {64}))
        assert not fused_after_a_shuffle(module.machine_code(job, {"D", "K"}))
        fused = module.machine_code(job, {"D", "K"}, enable_fp_fusion=True)
        assert fused_after_a_shuffle(fused), "the check finds nothing where there is something"


def test_one_triton_written_alone_keeps_the_rows_of_the_others(repository):
    with script(repository, "kernel_tritons") as module:
        older, newer = (
            module.Outcome(version, "2.4.1", 100, 0, 174, 0, 250) for version in ("3.9.0", "3.10.0")
        )
        held = module.table([newer, older])
        again = module.table([replace(older, failed=2)], module.written_rows(held))
    assert again == held.replace(
        "| 3.9.0 | 2.15 | 2.4.1 | 100 passed, 0 failed",
        "| 3.9.0 | 2.15 | 2.4.1 | 100 passed, 2 failed",
    )
    assert again.index("3.9.0") < again.index("3.10.0")
