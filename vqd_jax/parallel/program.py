"""What a compiled program takes of every device: memory, and traffic between devices."""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Of a number of every type that programs have.
BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_SHAPE = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_COLLECTIVE = re.compile(rf"^(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_WHILE = re.compile(r"\bwhile\(.*condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")
# Groups as axes of a mesh: the sizes of all axes, then the names of those that are exchanged over.
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")


class Memory(NamedTuple):
    """Bytes on one device. Outputs that reuse donated arguments count once, as arguments."""

    arguments: int
    temporaries: int
    outputs: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class Collective(NamedTuple):
    """One exchange between devices in a program.

    Attributes:
      kind: of ``KINDS``.
      shapes: of its results on one device.
      group: devices that take part in one exchange.
      times: how often a run of the program does it.
      moved: bytes that one device receives in all of them, with the ring algorithms.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    group: int
    times: int
    moved: int


def memory(compiled: Any) -> Memory:
    """What a compiled program holds on one device."""
    stats = compiled.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(stats.argument_size_in_bytes, stats.temp_size_in_bytes, max(outputs, 0))


def collectives(hlo: str) -> list[Collective]:
    """The exchanges of a compiled program, ``compiled.as_text()``; loops count their turns."""
    bodies, entry = _computations(hlo)
    times = _times(bodies, entry)
    found = {}
    for name, lines in bodies.items():
        for number, line in enumerate(lines):
            match = _COLLECTIVE.match(line)
            if match and times[name]:
                # An exchange that runs beside computations is written once for each of them, with
                # one channel.
                channel = _CHANNEL.search(line)
                key = channel.group(1) if channel else (name, number)
                result, kind, start = match.groups()
                # The TPU compiler keeps a fused reduce-scatter as a computation of this name.
                scattered = kind == "all-reduce" and name.startswith("all-reduce-scatter")
                found[key] = _collective(line, result, kind, start, times[name], scattered)
    return [c for c in found.values() if c.group > 1 or c.kind == "collective-permute"]


def by_kind(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """kind -> (exchanges, bytes moved a device) of a run of the program."""
    table = collections.Counter(), collections.Counter()
    for c in found:
        table[0][c.kind] += c.times
        table[1][c.kind] += c.moved
    return {kind: (table[0][kind], table[1][kind]) for kind in KINDS if table[0][kind]}


def gathered_activations(
    found: Iterable[Collective], parameter_shapes: Iterable[tuple[int, ...]], stream: int
) -> list[Collective]:
    """All-gathers of activations: of arrays of the size of a stream, but not of a parameter.

    Args:
      found: of ``collectives``.
      parameter_shapes: of all parameters; a stack of layers, or one of them, may be gathered.
      stream: elements [N, D] of the stream of one image. What is gathered of as many devices counts
        as activations where it holds as many streams; a vector an image, as its time, does not.
    """
    sizes = {math.prod(part) for shape in parameter_shapes for part in (shape, shape[1:])}
    return [
        c
        for c in found
        if c.kind == "all-gather"
        and any(math.prod(s) >= c.group * stream and math.prod(s) not in sizes for s in c.shapes)
    ]


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    bodies, entry, current = {}, "", None
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header and not line.startswith(" "):
            current = bodies.setdefault(header.group(1), [])
            if line.startswith("ENTRY"):
                entry = header.group(1)
        elif current is not None:
            current.append(line.strip())
    return bodies, entry


def _called(line: str, bodies: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    turns = 1
    if loop := _WHILE.search(line):
        # Loops over layers, chunks and steps count from 0 to a constant in their condition.
        limits = _LIMIT.findall("\n".join(bodies.get(loop.group(1), ())))
        turns = max(map(int, limits), default=1)
    for name in _CALLED.findall(line):
        yield name, turns
    for names in _BRANCHES.findall(line):
        for name in re.findall(r"[\w.\-]+", names):
            yield name, 1


def _times(bodies: dict[str, list[str]], entry: str) -> collections.Counter:
    """How often a run of the program runs every computation."""
    times = collections.Counter()

    def visit(name, count):
        times[name] += count
        for line in bodies.get(name, ()):
            for callee, turns in _called(line, bodies):
                visit(callee, count * turns)

    visit(entry, 1)
    return times


def _group(line: str) -> int:
    """How many devices take part in one exchange."""
    if match := _MESH_GROUPS.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match.group(2)))
    if match := _GROUPS.search(line):
        listed, width = match.groups()
        return int(width) if width else len(listed.split(","))
    return 1


def _collective(line, result, kind, start, times, scattered) -> Collective:
    arrays = [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in
              _SHAPE.findall(result)]  # fmt: skip
    if start and kind != "all-reduce":
        # (operands, results, contexts): the first half of the arrays are operands.
        arrays = [array for array in arrays if array[1]]
        arrays = arrays[len(arrays) // 2 :]
    group = _group(line)
    size = sum(BYTES[dtype] * math.prod(shape) for dtype, shape in arrays)
    share = (group - 1) / group
    if scattered:
        return Collective("reduce-scatter", tuple(s for _, s in arrays), group, times,
                          int(size * share) * times)  # fmt: skip
    moved = {
        "all-gather": size * share,
        "all-reduce": 2 * size * share,
        "reduce-scatter": size * (group - 1),
        "all-to-all": size * share,
        "collective-permute": size,
    }[kind]
    return Collective(kind, tuple(s for _, s in arrays), group, times, int(moved) * times)
