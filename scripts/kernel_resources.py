"""Compile every kernel configuration for sm_80, sm_86 and sm_90 and report what each one takes.

No GPU is needed. The table goes to kernels/RESULTS.md between its markers:

    python scripts/kernel_resources.py                     # print
    python scripts/kernel_resources.py --write             # and update kernels/RESULTS.md
    python scripts/kernel_resources.py --kernel nearest_kernel --arch 86 --json out.json

The exit status is 1 when a configuration spills registers, exceeds the chip's shared memory or
has no tensor-core instruction in its inner loop.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "kernels"))

RESULTS = ROOT / "kernels" / "RESULTS.md"
BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"
ARCHITECTURES = (80, 86, 90)
WIDTHS = (64, 128, 256, 1024)

POINTER_TYPES = {
    "mask_ptr": "*u8",
    "valid_ptr": "*u8",
    "rows_ptr": "*fp16",
    "codes_ptr": "*fp16",
    "runs_ptr": "*i32",
    "indices_ptr": "*i64",
    "counts_ptr": "*i64",
    "frames_ptr": "*i64",
    "queue_ptr": "*i64",
    "length_ptr": "*i64",
    "state_ptr": "*i64",
    "slots_ptr": "*i32",
    "order_ptr": "*i64",
    "offsets_ptr": "*i64",
    "bins_ptr": "*i64",
    "owners_ptr": "*i64",
    "chunks_ptr": "*i64",
    "bits_ptr": "*i32",
    "row_keys_ptr": "*i64",
    "paths_ptr": "*i64",
    "longer_ptr": "*i64",
    "code_keys_ptr": "*i64",
}
# Pointers whose type depends on the kernel.
OTHER_TYPES = {
    ("extent_kernel", "statistics_ptr"): "*i32",
    ("total_kernel", "codes_ptr"): "*i64",
    ("candidates_kernel", "keys_ptr"): "*i32",
    ("winners_kernel", "keys_ptr"): "*i32",
}
CLASSES = {
    "multiply-add": r"FFMA|FADD|FMUL|HFMA2|HADD2",
    "maximum": r"FMNMX|VIMNMX|IMNMX",
    "compare": r"FSETP|ISETP",
    "select": r"FSEL|SEL",
    "shuffle": r"SHFL|REDUX",
    "special": r"MUFU",
    "convert": r"F2FP|F2F|I2F|F2I",
    "move": r"MOV|PRMT|R2UR",
}
PLAIN = "(no products)"
EPILOGUE = ("multiply-add", "maximum", "compare", "select", "shuffle", "special", "convert")


@dataclass(frozen=True)
class Job:
    """One kernel, one configuration, one chip."""

    kernel: str
    architecture: int
    D: int
    variant: str
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int

    @property
    def tile(self) -> str:
        """BLOCK_N × BLOCK_K × BLOCK_D."""
        values = dict(self.constants)
        names = [name for name in ("BLOCK_N", "BLOCK_K", "BLOCK_D") if name in values]
        return " × ".join(str(values[name]) for name in names)


@dataclass(frozen=True)
class Report:
    """What one configuration takes; instruction counts are per score of the inner loop."""

    kernel: str
    variant: str
    architecture: int
    D: int
    tile: str
    warps: int
    stages: int
    registers: int
    stack: int
    local_memory_instructions: int
    shared: int
    shared_limit: int
    tensor_core: str
    tensor_instructions_per_tile: float
    other_instructions_per_tile: float
    epilogue_per_score: float
    shared_bytes_per_tile: float
    classes: dict[str, float]

    def problems(self) -> list[str]:
        """What makes this configuration unfit."""
        found = []
        if self.local_memory_instructions:
            found.append(f"spills ({self.local_memory_instructions} LDL/STL, {self.stack} B)")
        if self.shared > self.shared_limit:
            found.append(f"shared memory {self.shared} > {self.shared_limit}")
        if not self.tensor_core and self.variant != PLAIN:
            found.append("no tensor-core instruction in the inner loop")
        return found


def jobs(kernels: set[str], architectures: set[int], widths: set[int]) -> Iterator[Job]:
    """Every configuration of the tuning spaces."""
    from b2t_kernels import tuning
    from b2t_kernels.prepare import padded_width

    for architecture in sorted(architectures):
        for kernel in sorted(kernels & tuning.PLAIN_KERNELS.keys()):
            warps = tuning.PLAIN_KERNELS[kernel][2]
            for blocks in tuning.plain_variants(kernel):
                yield Job(kernel, architecture, max(widths), PLAIN, tuple(blocks.items()), warps, 3)
        for D in sorted(widths):
            width = padded_width(D)
            for kernel, space, variants in tuning.spaces(architecture, width):
                if kernel not in kernels:
                    continue
                for config in space:
                    for variant, flags in variants.items():
                        yield Job(
                            kernel,
                            architecture,
                            D,
                            variant,
                            tuple({**config.kwargs, **flags}.items()),
                            config.num_warps,
                            config.num_stages,
                        )


def _signature(function: Any, job: Job) -> tuple[dict[str, str], dict]:
    constants = dict(job.constants)
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = POINTER_TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        signature[name] = OTHER_TYPES.get((function.__name__, name), signature[name])
        if name not in ("N", "bucket", "splits"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, attributes


def compiled(job: Job, odd: Collection[str] = (), **options: Any) -> Any:
    """Triton's kernel for one configuration; the ``odd`` arguments are no multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from b2t_kernels import tuning

    function = tuning.kernel(job.kernel)
    signature, attributes = _signature(function, job)
    for name in odd:
        attributes.pop((function.arg_names.index(name),), None)
    source = ASTSource(
        fn=function, signature=signature, constexprs=dict(job.constants), attrs=attributes
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", job.architecture, 32),
        options={
            "num_warps": job.warps,
            "num_stages": job.stages,
            "enable_fp_fusion": True,
            **tuning.limits(job.kernel),
            **options,
        },
    )


def machine_code(job: Job, odd: Collection[str] = (), **options: Any) -> list[str]:
    """Instructions of one configuration, compiled as by `compiled`."""
    return _disassemble(compiled(job, odd, **options).asm["cubin"])[1]


def compile_job(job: Job) -> Report:
    """Compile one configuration and read its machine code."""
    from b2t_kernels import tuning

    made = compiled(job)
    usage, code = _disassemble(made.asm["cubin"])
    values = dict(job.constants)
    loop = inner_loop(code)
    macs = sum(_macs(line, job.warps) for line in loop)
    area = values.get("BLOCK_N", 1) * values.get("BLOCK_K", 1)
    tiles = macs / (area * values.get("BLOCK_D", 1))
    scores = area * max(tiles, 1e-9)
    counts = Counter(_class(line) for line in loop)
    threads = 32 * job.warps
    tensor = [line for line in loop if _class(line) == "tensor"]
    return Report(
        job.kernel,
        job.variant,
        job.architecture,
        job.D,
        job.tile,
        job.warps,
        job.stages,
        usage["REG"],
        usage["STACK"],
        sum(bool(re.match(r"(LDL|STL)\b", line)) for line in code),
        made.metadata.shared,
        tuning.SHARED_MEMORY_LIMIT[job.architecture],
        tensor[0].split()[0] if tensor else "",
        round(len(tensor) / max(tiles, 1e-9), 1) if tensor else 0.0,
        round((len(loop) - len(tensor)) / max(tiles, 1e-9), 1) if tensor else 0.0,
        round(sum(counts[name] for name in EPILOGUE) * threads / scores, 2) if tensor else 0.0,
        round(sum(map(_shared_bytes, loop)) * job.warps / max(tiles, 1e-9)) if tensor else 0,
        {name: round(counts[name] * threads / scores, 3) for name in CLASSES if tensor},
    )


def _disassemble(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    line = next(line for line in usage.splitlines() if "REG:" in line)
    numbers = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, flags=re.MULTILINE)
    return numbers, [f"{_bare(text)} @{address}" for address, text in code]


def _bare(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction.strip())


def _class(line: str) -> str:
    operation = line.split()[0].split(".")[0]
    if operation in ("HMMA", "HGMMA"):
        return "tensor"
    for name, pattern in CLASSES.items():
        if re.fullmatch(pattern, operation):
            return name
    return operation


def _macs(line: str, warps: int) -> float:
    """Multiply-adds of one tensor instruction, over all the warps of a block."""
    found = re.match(r"(HMMA|HGMMA)\.(\S+)", line)
    if not found:
        return 0.0
    if found[1] == "HMMA":
        shape = re.match(r"(16)(8|16)(\d+)", found[2])
        return warps * 16 * int(shape[2]) * int(shape[3]) if shape else 0.0
    shape = re.search(r"(\d+)x(\d+)x(\d+)", found[2])
    return warps / 4 * int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else 0.0


def _shared_bytes(line: str) -> int:
    """Bytes that one warp moves between shared memory and registers, or into it from global."""
    found = re.match(r"LDSM\S*\.([124])\b|(LDGSTS|LDS|STS)(\.\S+)?", line)
    if not found:
        return 0
    if found[1]:
        return 128 * int(found[1])
    width = re.search(r"\.(64|128)\b", found[0])
    return 32 * (int(width[1]) // 8 if width else 4)


def inner_loop(code: list[str]) -> list[str]:
    """The shortest backward branch's body that holds tensor-core instructions; [] if none does."""
    addresses = [int(line.rsplit("@", 1)[1], 16) for line in code]
    position = {address: index for index, address in enumerate(addresses)}
    best: list[str] = []
    for index, line in enumerate(code):
        target = re.match(r"BRA(?:\.\S+)?\s+(?:\S+,\s*)*`?\(?\.?L?_?x?_?(?:0x)?([0-9a-f]+)", line)
        if not target or int(target[1], 16) not in position:
            continue
        start = position[int(target[1], 16)]
        body = code[start : index + 1]
        holds = start < index and any(_class(entry) == "tensor" for entry in body)
        if holds and (not best or len(body) < len(best)):
            best = body
    return best


def table(reports: list[Report]) -> str:
    """The reports as a Markdown table, under the versions that compiled them."""
    import torch
    import triton

    head = (
        "| kernel | chip | D | tile N × K × D | warps, stages | registers | LDL/STL, stack (B) | "
        "shared (B) | "
        "tensor core | per tile: tensor, other | epilogue per score |"
    )
    compiler = f"Compiled by triton {triton.__version__}, torch {torch.__version__}."
    rows = [compiler, "", head, "|---" * 11 + "|"]
    for report in reports:
        rows.append(
            f"| {report.kernel} {report.variant} | sm_{report.architecture} | {report.D} | "
            f"{report.tile} | {report.warps}, {report.stages} | {report.registers} | "
            f"{report.local_memory_instructions}, {report.stack} | {report.shared:,} | "
            f"{report.tensor_core} | "
            f"{report.tensor_instructions_per_tile:g}, {report.other_instructions_per_tile:g} | "
            f"{report.epilogue_per_score:g} |"
        )
    return "\n".join(rows)


def write_between_markers(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between the markers of ``path``."""
    old = path.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        raise SystemExit(f"{path}: the markers {begin} and {end} are missing")
    before, rest = old.split(begin, 1)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def report_all(selected: list[Job], workers: int) -> list[Report]:
    """Compile the jobs, several at a time (the compiler's passes release the GIL)."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(compile_job, selected))


def main() -> int:
    from b2t_kernels import tuning

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(tuning.KERNELS) + sorted(tuning.PLAIN_KERNELS)
    parser.add_argument("--kernel", nargs="+", default=names, choices=names)
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--width", nargs="+", type=int, default=WIDTHS, help="values of D")
    parser.add_argument("--json", type=Path, help="write the reports here as well")
    parser.add_argument("--write", action="store_true", help="update kernels/RESULTS.md")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    selected = list(jobs(set(options.kernel), set(options.arch), set(options.width)))
    reports = report_all(selected, options.workers)
    print(table(reports))
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    if options.write:
        write_between_markers(RESULTS, table(reports))
    unfit = [(report, problem) for report in reports for problem in report.problems()]
    for report, problem in unfit:
        place = f"{report.kernel} {report.variant} sm_{report.architecture} D={report.D}"
        print(f"{place} {report.tile} w{report.warps} s{report.stages}: {problem}", file=sys.stderr)
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())
