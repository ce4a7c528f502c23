"""The comparison in words: rows, the fastest of every library at every level, and who is dominated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bilevel_imaging.experiments.benchmark import ours

Record = dict[str, Any]
OURS = (ours.NAME, ours.COMPILED)


def summary(rows: Sequence[Record], levels: Sequence[float]) -> list[Record]:
    """By level: the fastest passing row of every library, and the ratio of our CPU time to the best peer's."""
    found = []
    for level in levels:
        libraries = dict.fromkeys(row["library"] for row in rows)
        best = {name: _fastest([row for row in rows if row["library"] == name], level) for name in libraries}
        mine = _fastest([row for name, row in best.items() if name in OURS and row], level)
        peer = _fastest([row for name, row in best.items() if name not in OURS and row], level)
        ratio = mine["cpu_seconds"] / peer["cpu_seconds"] if mine and peer else None
        found.append(
            {
                "level": level,
                "fastest": {name: row and _place(row) for name, row in best.items()},
                "ours": mine and _place(mine),
                "best_peer": peer and _place(peer),
                "ratio": ratio,
            }
        )
    return found


def dominated(rows: Sequence[Record]) -> list[Record]:
    """Rows of ours, timed as often as the others, for which a peer has both a smaller error and a smaller CPU time."""
    calls = max((row["calls"] for row in rows), default=0)
    timed = [row for row in rows if row["error"] is not None and row["calls"] == calls]
    found = []
    for mine in (row for row in timed if row["library"] in OURS):
        better = [
            row
            for row in timed
            if row["library"] not in OURS and row["error"] < mine["error"] and row["cpu_seconds"] < mine["cpu_seconds"]
        ]
        if better:
            found.append({"ours": _place(mine), "by": _place(min(better, key=lambda row: row["cpu_seconds"]))})
    return found


def _fastest(rows: Sequence[Record], level: float) -> Record | None:
    passing = [row for row in rows if row["error"] is not None and row["error"] <= level]
    calls = max((row["calls"] for row in passing), default=0)
    return min((row for row in passing if row["calls"] == calls), key=lambda row: row["cpu_seconds"], default=None)


def _place(row: Record) -> Record:
    return {key: row[key] for key in ("library", "method", "setting", "error", "bound", "cpu_seconds", "wall_seconds")}


def table(record: Record) -> str:
    """The record as text."""
    lines = []
    for name, workload in record["workloads"].items():
        lines += [f"{name}: {workload['title']}, {workload['images']} x {workload['size']}x{workload['size']}"]
        lines += [f"truth certified to {workload['reference_relative_bound']:.1e}", ""]
        lines += _rows(workload["rows"])
        lines += ["", *_summary(workload["summary"]), ""]
        lines += _dominated(workload["dominated"])
        lines += [""]
    lines += [f"{library}: {reason}" for library, reason in record["skipped"].items()]
    return "\n".join(lines).rstrip()


def _rows(rows: Sequence[Record]) -> list[str]:
    """Those that were timed repeatedly, and those without numbers."""
    calls = max((row["calls"] for row in rows), default=0)
    head = f"{'library':24s} " + " ".join(f"{word:>8s}" for word in ("CPU s", "wall s", "error", "bound"))
    lines = [head + "".join(f" {word:>6s}" for word in ("grads", "HVPs", "MiB")) + "  setting"]
    for row in rows:
        if row["error"] is None:
            lines.append(f"{row['library']:24s} {row['method']} {row['setting']}: {row['note']}")
        elif row["calls"] == calls:
            bound = "none" if row["bound"] is None else f"{row['bound']:.1e}"
            lines.append(
                f"{row['library']:24s} {row['cpu_seconds']:8.3f} {row['wall_seconds']:8.3f} {row['error']:8.1e} "
                f"{bound:>8s} {_count(row['gradients'])} {_count(row['hvps'])} {_count(row['peak_memory_mib'])}  "
                f"{row['method']}; {row['setting']}"
            )
    return lines


def _count(value: float | None) -> str:
    return f"{'' if value is None else f'{value:.0f}':>6s}"


def _summary(levels: Sequence[Record]) -> list[str]:
    lines = []
    for level in levels:
        ratio = "" if level["ratio"] is None else f", ours / best peer {level['ratio']:.2f}"
        lines.append(f"error at most {level['level']:g}{ratio}")
        for library, row in level["fastest"].items():
            words = "nothing passes"
            if row is not None:
                words = f"{row['cpu_seconds']:8.3f} s  {row['method']}; {row['setting']}"
            lines.append(f"  {library:24s} {words}")
    return lines


def _dominated(pairs: Sequence[Record]) -> list[str]:
    if not pairs:
        return ["No row of ours is slower and less accurate than one of a peer."]
    return [
        f"dominated: {pair['ours']['library']}, {pair['ours']['setting']} ({pair['ours']['cpu_seconds']:.3f} s, error "
        f"{pair['ours']['error']:.1e}) by {pair['by']['library']}, {pair['by']['method']}; {pair['by']['setting']} "
        f"({pair['by']['cpu_seconds']:.3f} s, {pair['by']['error']:.1e})"
        for pair in pairs
    ]
