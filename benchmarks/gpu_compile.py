"""Compiles train steps and samplers for an H100 that is not there, and prints what they take.

pip install -e '.[gpu]'
python benchmarks/gpu_compile.py --all --json=gpu_compile.jsonl
python benchmarks/gpu_compile.py --config=configs/coco.py --program=sample --kernels=20

By XLA's compiler for that GPU, without trying out kernels; no GPU is needed. Of every program: GiB
(arguments, temporaries), and its time on paper, where a kernel takes as long as its products do at
the published peak or its bytes at the published bandwidth, whichever is longer. Nothing is timed.
``diffusion`` is the share of noise, bound, guidance, truncation, posterior and draws;
``utilisation`` that of the FLOPs of the formulas in what the peak would do meanwhile. ``--kernels``
lists what takes longest.
"""

import argparse
import collections
import itertools
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tpu_compile

from vqd_jax.parallel import program, sharding

GIB = 2**30
# Published bfloat16 FLOP/s without sparsity, and bytes/s of memory, of an H100 SXM.
PEAK, BANDWIDTH = 989e12, 3.352e12

COCO, CUB_S, ITHQ = (f"configs/{name}.py" for name in ("coco", "cub_small", "ithq"))
# (program, config, rows of the batch, remat, whether layers are unrolled).
TABLE = (
    ("train", CUB_S, 32, "none", True),
    ("train", COCO, 32, "none", True),
    ("train", COCO, 32, "dots", True),
    ("train", COCO, 32, "dots", False),
    ("train", COCO, 32, "full", False),
    ("train", ITHQ, 16, "none", True),
    ("train", ITHQ, 16, "dots", False),
    ("sample", CUB_S, 32, "none", True),
    ("sample", COCO, 32, "none", True),
    ("sample", ITHQ, 16, "none", True),
)

# Scopes of the rest. Copies have none.
_OTHERS = re.compile("denoiser|text_encoder|optimizer")
_FREE = (
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "copy-done",
    "slice-done",
)  # fmt: skip
# Arrays in the memory that a TPU has on its chip, as they stand in its programs.
_ON_CHIP = re.compile(r"\b\w+\[[\d,]*\]\{[^{}]*S\([1-9]\)[^{}]*\}")
# What a library's kernel may use beside its result.
_WORKSPACE = re.compile(r", s8\[\d+\]\{0\}\)$")


class Instruction(NamedTuple):
    """A line of a compiled program."""

    name: str
    result: str
    operation: str
    operands: list[str]
    rest: str

    def named(self, pattern: str) -> str:
        found = re.search(pattern, self.rest)
        return found.group(1) if found else ""


class Kernel(NamedTuple):
    """What is launched, of all its turns together."""

    seconds: float
    flops: float
    moved: float
    turns: int
    name: str
    scope: str


def parse(hlo: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computations by name, their instructions in order, and the name of the entry."""
    computations, entry, current = {}, "", None
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (found := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)", line)):
            name, rest = found.groups()
            # The type ends at the first space outside its parentheses.
            depth = itertools.accumulate((letter == "(") - (letter == ")") for letter in rest)
            end = next(i for i, open_ in enumerate(depth) if not open_ and rest[i] == " ")
            result, rest = rest[:end], rest[end:].strip()
            operation, _, arguments = rest.partition("(")
            # No type and no parenthesis stands within the operands of a compiled program.
            operands = re.findall(r"%([\w.\-]+)", arguments.partition(")")[0])
            current[name] = Instruction(name, result, operation, operands, rest)
    return computations, entry


def read_by_fusion(
    body: dict[str, Instruction], computations: dict[str, dict[str, Instruction]]
) -> int:
    """Bytes that a fusion reads: of an operand that is only sliced, the slices."""
    parameters = (line for line in body.values() if line.operation == "parameter")
    return sum(_read(parameter, body, computations) for parameter in parameters)


def _read(parameter, body, computations) -> int:
    size = program.size(parameter.result)
    sliced, names = 0, {parameter.name}
    for user in body.values():
        if not names & set(user.operands):
            continue
        if user.operation == "bitcast":
            names.add(user.name)
        elif user.operation in ("dynamic-slice", "slice", "gather"):
            sliced += program.size(user.result)
        elif user.operation == "fusion":
            # A TPU's product has what feeds it within it.
            inner = computations[user.named(r"calls=%([\w.\-]+)")]
            for place, operand in enumerate(user.operands):
                if operand in names:
                    found = next(
                        x for x in inner.values() if x.rest.startswith(f"parameter({place})")
                    )
                    sliced += _read(found, inner, computations)
        elif user.operation != "dynamic-update-slice" or user.operands[0] not in names:
            return size
    return min(sliced, size)


def written_by_fusion(body: dict[str, Instruction]) -> int:
    """Bytes that a fusion writes: of an array that is updated in place, the part."""

    def written(name):
        found = body[name]
        if found.operation == "bitcast":
            return written(found.operands[0])
        if found.operation == "tuple":
            return sum(map(written, found.operands))
        if found.operation == "dynamic-update-slice":
            return program.size(body[found.operands[1]].result)
        return program.size(found.result)

    return written(list(body)[-1])


def product_flops(kernel: Instruction, body: dict[str, Instruction]) -> float:
    """FLOPs of the products of a library's kernel; what is not one has none."""
    target = kernel.named(r'custom_call_target="([^"]+)"')
    operands = [program.arrays(body[name].result)[:1] for name in kernel.operands[:2]]
    if "matmul" in target:
        inner = int(kernel.named(r'"lhs_contracting_dimensions":\["(\d+)"'))
        return 2 * math.prod(program.arrays(kernel.result)[0][1]) * operands[0][0][1][inner]
    if "fmha" in target:
        (_, (batch, queries, heads, width)), (_, (_, keys, _, _)) = operands[0][0], operands[1][0]
        products = 5 if "Backward" in target else 2
        return 2 * products * batch * heads * queries * keys * width
    if "conv" in target:
        shapes = [found[0][1] for found in (*operands, program.arrays(kernel.result))]
        kernels = [shape for shape in shapes if shape.count(3) == 2]
        pictures = [shape for shape in shapes if shape.count(3) != 2]
        places = min(math.prod(shape) // shape[-1] for shape in pictures)
        return 2 * math.prod(kernels[0]) * places
    return 0.0


def moved_by(kernel: Instruction, body: dict[str, Instruction]) -> int:
    """Bytes that what is no fusion reads and writes; a copy that goes on beside others counts once.

    Such a copy counts where it begins.
    """
    read = sum(program.size(body[name].result) for name in kernel.operands if name in body)
    if kernel.operation == "slice-start":
        bounds = re.findall(r"\[(\d+):(\d+)\]", kernel.named(r"slice=\{([^}]*)\}"))
        dtype, _ = program.arrays(body[kernel.operands[0]].result)[0]
        return program.BYTES[dtype] * math.prod(int(end) - int(start) for start, end in bounds)
    if kernel.operation == "copy-start":
        return read
    return read + program.size(_WORKSPACE.sub(")", kernel.result))


def turns_of(loop: Instruction, computations: dict[str, dict[str, Instruction]]) -> int:
    """How often a loop turns; a TPU's says it in its condition alone."""
    if known := loop.named(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition = computations.get(loop.named(r"condition=%([\w.\-]+)"), {}).values()
    limits = [line.named(r"^constant\((\d+)\)") for line in condition]
    return max((int(limit) for limit in limits if limit), default=1)


def kernels(hlo: str, peak: float = PEAK, bandwidth: float = BANDWIDTH) -> list[Kernel]:
    """Everything that a compiled program launches, the longest first.

    Args:
      hlo: text of the program.
      peak: FLOP/s of the chip.
      bandwidth: bytes/s of its memory.
    """
    computations, entry = parse(_ON_CHIP.sub("token[]", hlo))
    found = []

    def visit(name, turns):
        body = computations[name]
        for line in body.values():
            if line.operation == "while":
                again = turns_of(line, computations)
                visit(line.named(r"body=%([\w.\-]+)"), turns * again)
            elif line.operation == "conditional":
                branches = line.named(r"branch_computations=\{([^}]*)\}")
                for branch in re.findall(r"%([\w.\-]+)", branches):
                    visit(branch, turns)
            elif line.operation == "call":
                visit(line.named(r"to_apply=%([\w.\-]+)"), turns)
            elif line.operation not in _FREE:
                inner = computations.get(line.named(r"calls=%([\w.\-]+)"))
                if inner:
                    moved = read_by_fusion(inner, computations) + written_by_fusion(inner)
                else:
                    moved = moved_by(line, body)
                flops = product_flops(line, body) if line.operation == "custom-call" else 0.0
                seconds = turns * max(flops / peak, moved / bandwidth)
                scope = line.named(r'op_name="([^"]*)"')
                found.append(Kernel(seconds, turns * flops, turns * moved, turns, line.name, scope))

    visit(entry, 1)
    return sorted(found, reverse=True)


def measure(job: tuple, num_kernels: int = 0) -> dict:
    """Compiles one program and reads off what it takes."""
    kind, path, rows, remat, unrolled = job
    config = tpu_compile.load_config(path, rows, 1, 1)
    config.denoiser.dtype = "bfloat16"
    config.denoiser.remat = remat
    config.denoiser.scan_unroll = config.denoiser.num_layers if unrolled else 1
    devices = program.topology("h100:1")
    mesh = sharding.make_mesh(config, devices)
    with tempfile.NamedTemporaryFile("r", suffix=".hlo", encoding="utf-8") as hlo:
        result = tpu_compile.measure(kind, config, mesh, rows, hlo.name)
        text = hlo.read()
    launched = kernels(text)
    for kernel in launched[:num_kernels]:
        print(
            f"{kernel.seconds * 1e3:9.3f} ms {kernel.flops / 1e12:8.2f} TFLOP "
            f"{kernel.moved / GIB:8.2f} GiB {kernel.turns:6} x {kernel.name[:40]:40} "
            f"{kernel.scope[-90:]}"
        )
    total = math.fsum(kernel.seconds for kernel in launched)
    steps = config.diffusion.num_steps if kind == "sample" else 1
    passes = 2 if kind == "sample" else 3
    flops = passes * tpu_compile.forward_flops(config) * rows
    return {
        "job": list(job),
        "arguments": result["arguments"],
        "temporaries": result["temporaries"],
        "compile_seconds": result["compile_seconds"],
        "targets": collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text)),
        "milliseconds": total / steps * 1e3,
        "products": math.fsum(k.seconds for k in launched if k.flops) / steps * 1e3,
        "diffusion": math.fsum(
            k.seconds for k in launched if k.scope and not _OTHERS.search(k.scope)
        )
        / total,
        "utilisation": flops * steps / total / PEAK,
    }


def row(result: dict) -> str:
    """One line of the table."""
    kind, path, rows, remat, unrolled = result["job"]
    attention = sum(n for name, n in result["targets"].items() if "fmha" in name)
    return (
        f"| {kind} | {Path(path).stem} | {rows} | {remat} | {'yes' if unrolled else 'no'} | "
        f"{result['arguments'] / GIB:.1f} + {result['temporaries'] / GIB:.1f} | "
        f"{'yes' if attention else 'no'} | {result['milliseconds']:.1f} | "
        f"{result['products']:.1f} | {result['diffusion']:.1%} | "
        f"{result['utilisation']:.0%} | {result['compile_seconds']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=COCO)
    parser.add_argument("--program", choices=("train", "sample"), default="train")
    parser.add_argument("--rows", type=int, default=32, help="of the batch")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--unrolled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--all", action="store_true", help="the table of docs/performance.md")
    parser.add_argument("--kernels", type=int, default=0, help="list as many of a program")
    parser.add_argument("--json", help="file to which a line a program is appended")
    flags = parser.parse_args()
    jobs = TABLE
    if not flags.all:
        jobs = [(flags.program, flags.config, flags.rows, flags.remat, flags.unrolled)]
    print(
        "| program | config | rows | remat | unrolled | arguments + temporaries, GiB | cuDNN "
        "attention | a step, ms | products, ms | diffusion | utilisation | compiled in, s |"
    )
    print("|" + "---|" * 12)
    for job in jobs:
        result = measure(job, flags.kernels)
        print(row(result), flush=True)
        if flags.json:
            with open(flags.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
