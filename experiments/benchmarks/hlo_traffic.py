"""Bytes that collectives move: from the text of a compiled program, and from the counter of the loopback device."""

import re
from collections.abc import Callable

import psutil

ITEM_BYTES = {"pred": 1, "bf16": 2} | {f"{kind}{8 * size}": size for kind in "suf" for size in (1, 2, 4, 8)}
# bytes that a device receives, from the bytes of the result and the devices of a group; an all-reduce runs as a ring
RECEIVED: dict[str, Callable[[int, int], float]] = {
    "all-gather": lambda size, group: size * (group - 1) / group,
    "all-to-all": lambda size, group: size * (group - 1) / group,
    "all-reduce": lambda size, group: 2 * size * (group - 1) / group,
    "reduce-scatter": lambda size, group: size * (group - 1),
    "collective-permute": lambda size, group: size,
}
HEAD = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\)\s+->\s.*\{\s*$")
# name = shape op(...: shapes hold comments and layouts, shapes of tuples hold parentheses
COLLECTIVE = re.compile(rf"=\s+(\(?[a-z].*?)\s({'|'.join(RECEIVED)})(-start)?\((.*)$")
CALLS = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|[%\w.\-]+)")


def count_received_bytes(hlo: str) -> dict[str, float]:
    """Count the bytes that a device receives in a round, from the text of a compiled chunk of rounds.

    Each collective counts once: the loop over rounds calls its body once a round, and inner loops hold no collectives.

    Returns:
        Bytes of every round under `always`, bytes that rounds without uploads save under `skipped`.

    Raises:
        ValueError: A shape or a group of devices has an unknown form.
    """
    bodies, entry = parse_computations(hlo)
    counted: dict[str, float] = {"always": 0.0, "skipped": 0.0}
    seen: set[tuple[str, str]] = set()
    todo = [(entry, "always")]
    while todo:
        if (call := todo.pop()) in seen:
            continue
        seen.add(call)
        name, kind = call
        for line in bodies[name]:
            if match := COLLECTIVE.search(line):
                counted[kind] += collective_bytes(*match.groups())
            branch = "skipped" if " conditional(" in line else kind
            names = [n for names in CALLS.findall(line) for n in re.findall(r"[\w.\-]+", names)]
            todo += [(n, branch) for n in names if n in bodies]
    return counted


def parse_computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation and the name of the entry computation."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if head := HEAD.match(line):
            lines = bodies[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    if not entry:
        raise ValueError("text of a compiled program: must have an ENTRY computation")
    return bodies, entry


def collective_bytes(shapes: str, op: str, start: str | None, attributes: str) -> float:
    """Return the bytes that a device receives in one collective."""
    sizes = []
    for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes):
        if dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {dtype} in a compiled program: must be one of {sorted(ITEM_BYTES)}")
        sizes.append(ITEM_BYTES[dtype])
        for dim in filter(None, dims.split(",")):
            sizes[-1] *= int(dim)
    if start and len(sizes) > 1:  # (operands, results)
        sizes = sizes[len(sizes) // 2 :]
    return RECEIVED[op](sum(sizes), group_size(attributes))


def group_size(attributes: str) -> int:
    """Return the number of devices in each group of a collective."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):  # groups x devices
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    if "source_target_pairs" in attributes:
        return 1
    raise ValueError(f"attributes of a collective, {attributes[:80]}: must have replica_groups")


def read_loopback_bytes() -> int | None:
    """Return the bytes that the loopback device has received from all programs; None without such a device."""
    counters = psutil.net_io_counters(pernic=True)
    return next((counters[name].bytes_recv for name in ("lo", "lo0") if name in counters), None)
