"""What a compiled program does, read from its text: collectives, products, and how often.

XLA's own analysis counts the body of a loop once, and says nothing about communication. Here each
instruction counts as often as the loops around it run, and the branches of a condition as their
mean, since one of them runs.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLS = re.compile(r"(?:calls|body|condition|to_apply)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """Dtype, shape and layout of an array in a program."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> float:
        return math.prod(self.shape) * _bits(self.dtype) / 8

    @property
    def tiled_shape(self) -> tuple[int, ...]:
        """The shape with its padding to the tiles of the layout: `{1,0:T(8,128)}` on a TPU."""
        found = re.match(r"\{([\d,]*):T\(([\d,]+)\)", self.layout)
        if not found or not self.shape:
            return self.shape
        minor_to_major = [int(i) for i in found[1].split(",")]
        tile = [int(n) for n in found[2].split(",")]
        shape = list(self.shape)
        for axis, size in zip(minor_to_major, reversed(tile)):
            shape[axis] = -(-shape[axis] // size) * size
        return tuple(shape)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


def arrays(text: str) -> list[Array]:
    """The arrays of a shape; several for a tuple."""
    return [
        Array(dtype, tuple(map(int, shape.split(","))) if shape else (), layout)
        for dtype, shape, layout in _ARRAY.findall(text)
    ]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name, opcode: as the program calls them.
      result: its arrays.
      operands: the names of its operands.
      text: all that follows the result's shape.
    """

    name: str
    opcode: str
    result: list[Array]
    operands: list[str]
    text: str


def _parse_line(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    rest = line[found.end() :]
    if rest.startswith("("):  # a tuple; its layouts have parentheses, too
        depth = np.cumsum([(letter == "(") - (letter == ")") for letter in rest])
        end = int(np.argmax(depth == 0))
        shape, rest = rest[: end + 1], rest[end + 2 :]
    else:
        shape, _, rest = rest.partition(" ")
    opcode, _, inside = rest.partition("(")
    operands = re.findall(r"%([\w.-]+)", inside.partition(")")[0])
    return Instruction(found[1], opcode, arrays(shape), operands, rest)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation of a program: its instructions by name, and how often it runs in a step."""

    instructions: dict[str, Instruction]
    runs: float


def parse(text: str) -> list[Computation]:
    """The computations of an optimised program (`compiled.as_text()`) that run at all."""
    found: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line and not line[0].isspace():
            header = _HEADER.match(line)
            current = found.setdefault(header[2], {}) if header else None
            if header and header[1]:
                entry = header[2]
        elif current is not None and (instruction := _parse_line(line)):
            current[instruction.name] = instruction
    runs: dict[str, float] = defaultdict(float)

    def visit(name: str, times: float) -> None:
        runs[name] += times
        for instruction in found[name].values():
            if instruction.opcode.endswith(("-done", "-update")):
                continue  # of what has started elsewhere
            inner = times * (_trips(instruction, found) if instruction.opcode == "while" else 1)
            called = _called(instruction, found)
            if instruction.opcode == "conditional":
                inner /= max(1, len(called))
            for computation in called:
                visit(computation, inner)

    visit(entry, 1)
    return [Computation(found[name], times) for name, times in runs.items()]


def _called(instruction: Instruction, computations) -> list[str]:
    called = _CALLS.findall(instruction.text)
    for branches in _BRANCHES.findall(instruction.text):
        called += re.findall(r"%?([\w.-]+)", branches)
    return [name for name in called if name in computations]


def _trips(loop: Instruction, computations) -> int:
    """How often a loop runs: XLA's annotation, or the bound that a scan's counter, from 0, has."""
    if known := _TRIPS.search(loop.text):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.text)
    names, bounds = [condition[1]], set()
    while names:
        for instruction in computations[names.pop()].values():
            names += _called(instruction, computations)
            if instruction.opcode == "constant" and instruction.result[0].dtype == "s32":
                bounds.add(int(re.search(r"constant\((-?\d+)\)", instruction.text)[1]))
    return bounds.pop() if len(bounds) == 1 else 1


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a program.

    Attributes:
      kind: one of `COLLECTIVES`.
      axes: the axes of the mesh along which devices communicate.
      dtypes: of what is sent.
      shapes: of the larger one of operand and result.
      bytes: of the larger one of operand and result, on one device.
      runs: how often it runs in a step.
    """

    kind: str
    axes: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    bytes: float
    runs: float


def collectives(computations: list[Computation], mesh) -> Iterator[Collective]:
    """The collectives of a program that was compiled for a mesh."""
    for computation in computations:
        for instruction in computation.instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            operands = [
                array
                for name in instruction.operands
                if name in computation.instructions
                for array in computation.instructions[name].result
            ]
            result = instruction.result
            if instruction.opcode.endswith("-start") and len(result) > len(operands):
                result = result[len(operands) :]  # a pair of operands and results
            larger = max((operands, result), key=lambda arrays: sum(a.bytes for a in arrays))
            yield Collective(
                kind=kind,
                axes=_axes(instruction.text, mesh),
                dtypes=tuple(sorted({a.dtype for a in larger if a.dtype != "token"})),
                shapes=tuple(a.shape for a in larger),
                bytes=sum(a.bytes for a in larger),
                runs=computation.runs,
            )


def groups(text: str, devices: int) -> np.ndarray | list[list[int]]:
    """The groups of devices of a collective, from the text of its instruction."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)", pairs[0])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, of, order = (
            [int(n) for n in found.split(",")] if found else None for found in iota.groups()
        )
        ids = np.arange(math.prod(of)).reshape(of)
        return (ids.transpose(order) if order else ids).reshape(shape)
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return [
            [int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])
        ]
    return [list(range(devices))]


def _axes(text: str, mesh) -> tuple[str, ...]:
    sizes = tuple(mesh.shape.values())
    varying = set()
    for group in groups(text, math.prod(sizes)):
        places = np.array(np.unravel_index(np.asarray(group), sizes))
        varying |= set(np.flatnonzero((places != places[:, :1]).any(1)))
    return tuple(name for i, name in enumerate(mesh.shape) if i in varying)


def product_flops(computations: list[Computation], tiled: bool = False) -> float:
    """Operations of all matrix products and convolutions on one device, loops counted in full.

    Args:
      computations: of the program.
      tiled: whether shapes are padded to the tiles of their layouts, as a TPU computes them.
    """
    total = 0.0
    for computation in computations:
        for instruction in computation.instructions.values():
            if instruction.opcode in ("dot", "convolution"):
                operands = [
                    computation.instructions[name].result[0] for name in instruction.operands
                ]
                total += computation.runs * _product(instruction, *operands, tiled)
    return total


def _product(instruction: Instruction, left: Array, right: Array, tiled: bool) -> float:
    out = instruction.result[0]
    shapes = [a.tiled_shape if tiled else a.shape for a in (left, right, out)]
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        contracted = [shapes[0][int(i)] for i in axes[1].split(",")] if axes and axes[1] else []
        return 2.0 * math.prod(shapes[2]) * math.prod(contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    options = dict(item.split("=") for item in window[1].split()) if window else {}
    spatial = sorted(letter for letter in labels[1] if letter.isdigit())
    pairs = 1
    for i, letter in enumerate(spatial):
        pairs *= _window_pairs(
            left.shape[labels[1].index(letter)],
            out.shape[labels[3].index(letter)],
            {name: value.split("x")[i] for name, value in options.items()},
        )
    batch_and_features = [shapes[2][labels[3].index(letter)] for letter in "bf"]
    return 2.0 * pairs * math.prod(batch_and_features) * shapes[1][labels[2].index("i")]


def _window_pairs(size: int, out: int, options: dict[str, str]) -> int:
    """How many pairs (output place, place in the window) meet an element, not padding."""
    window = int(options.get("size", 1))
    stride, base = int(options.get("stride", 1)), int(options.get("lhs_dilate", 1))
    dilate = int(options.get("rhs_dilate", 1))
    low = int(options.get("pad", "0_0").split("_")[0])
    places = np.arange(out)[:, None] * stride + np.arange(window)[None] * dilate - low
    inside = (places >= 0) & (places <= (size - 1) * base) & (places % base == 0)
    return int(inside.sum())
