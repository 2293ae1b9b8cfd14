"""Bytes that collectives move: counted in the compiled program, and on the loopback device between processes."""

import re
from collections.abc import Callable
from pathlib import Path

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8}
# what a device receives, as a function of the bytes of the result and of the devices in a group. An all-reduce as a ring
RECEIVED: dict[str, Callable[[int, int], float]] = {
    "all-gather": lambda size, group: size * (group - 1) / group,
    "all-to-all": lambda size, group: size * (group - 1) / group,
    "all-reduce": lambda size, group: 2 * size * (group - 1) / group,
    "reduce-scatter": lambda size, group: size * (group - 1),
    "collective-permute": lambda size, group: size,
}
HEAD = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\)\s+->\s.*\{\s*$")
# name = shape op(...: shapes hold comments and layouts, tuples of them parentheses
COLLECTIVE = re.compile(rf"=\s+(\(?[a-z].*?)\s({'|'.join(RECEIVED)})(-start)?\((.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
LISTED = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


def count_received_bytes(hlo: str) -> dict[str, float]:
    """Bytes that a device receives in a round, by a compiled chunk's text: `always`, and `skipped` where nobody sends.

    Each collective counts once: the loop over rounds calls its body once a round, and no inner loop may hold one that is
    called more often.

    Raises:
        ValueError: a shape or a group of devices is not understood.
    """
    bodies, entry = parse_computations(hlo)
    counted: dict[str, float] = {"always": 0.0, "skipped": 0.0}
    seen: set[tuple[str, bool]] = set()
    todo = [(entry, False)]
    while todo:
        name, inside = todo.pop()
        if (name, inside) in seen:
            continue
        seen.add((name, inside))
        for line in bodies[name]:
            if match := COLLECTIVE.search(line):
                counted["skipped" if inside else "always"] += collective_bytes(match)
            branch = inside or " conditional(" in line
            called = CALLED.findall(line) + [n.strip(" %") for m in LISTED.findall(line) for n in m.split(",")]
            todo += [(n, branch) for n in called if n in bodies]
    return counted


def parse_computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """(Lines of each computation, name of the entry)."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if head := HEAD.match(line):
            lines = bodies[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    if not entry:
        raise ValueError("text of a compiled program: expected an ENTRY computation")
    return bodies, entry


def collective_bytes(match: re.Match[str]) -> float:
    """What a device receives by one collective."""
    shapes, op, start, rest = match.groups()
    sizes = [array_bytes(dtype, dims) for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)]
    if start and len(sizes) > 1:  # (operands, results)
        sizes = sizes[len(sizes) // 2 :]
    return RECEIVED[op](sum(sizes), group_size(rest))


def array_bytes(dtype: str, dims: str) -> int:
    """Bytes of an array."""
    if dtype not in BYTES:
        raise ValueError(f"dtype {dtype} in a compiled program: expected one of {sorted(BYTES)}")
    size = BYTES[dtype]
    for dim in filter(None, dims.split(",")):
        size *= int(dim)
    return size


def group_size(attributes: str) -> int:
    """Devices in a group of a collective."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):  # groups x devices
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    if "source_target_pairs" in attributes:
        return 1
    raise ValueError(f"groups of devices of a collective, {attributes[:80]}: expected replica_groups")


def loopback_bytes() -> int | None:
    """Bytes that the loopback device has received since the machine started, by whomever; None where it does not tell."""
    path = Path("/proc/net/dev")
    lines = [
        line.split(":")[1].split() for line in (path.read_text() if path.exists() else "").splitlines() if "lo:" in line
    ]
    return int(lines[0][0]) if lines else None
