"""Time, error and memory of every setting: up the ladders once, then the fastest ones again in turn.

A ladder is climbed until a setting passes the smallest level, a call takes longer than the cap, or the error has
stopped falling; every second setting first, then those between one that fails a level and one that passes it. The
fastest settings that pass a level are then timed in rounds, every one of them once in a round, so that what else the
machine does falls on all alike.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bilevel_imaging.experiments.benchmark.memory import peak
from bilevel_imaging.experiments.benchmark.method import Answer, Ladder, Setting

STALLED_AFTER = 3
"""Settings in a row without an error below that of the one before them."""


@dataclass(eq=False)
class Row:
    """One setting of one method.

    Attributes:
        library: whose method it is.
        method: in words.
        setting: in words.
        note: why the row has no numbers, or why its ladder ends here.
        error: true relative error; ``None`` without an answer, as all that follow.
        bound: relative bound that the method itself reports; ``None`` if it reports none.
        gradients: per image; ``None`` where they can't be counted.
        hvps: per image, likewise.
        extra_seconds: what the first call took longer than the next one in wall time: compiling, if anything.
        cpu: CPU seconds of all threads, one entry per timed call.
        wall: wall seconds, likewise.
        memory: peak of a call above what was held before it, MiB; ``None`` if it was not measured.
        compute: the call, to time it again.
        measure_memory: see ``Setting.memory``.
    """

    library: str
    method: str
    setting: str
    note: str = ""
    error: float | None = None
    bound: float | None = None
    gradients: float | None = None
    hvps: float | None = None
    extra_seconds: float | None = None
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    memory: float | None = None
    compute: Callable[[], Answer] | None = None
    measure_memory: Callable[[], float | None] | None = None

    @property
    def seconds(self) -> float:
        """Median CPU seconds."""
        return statistics.median(self.cpu)

    def time(self) -> Answer:
        """One more timed call."""
        assert self.compute is not None
        start, cpu = time.perf_counter(), time.process_time()
        answer = self.compute()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - start)
        return answer

    def record(self) -> dict[str, Any]:
        """For JSON: medians, and how many calls they are of."""
        names = ("library", "method", "setting", "note", "error", "bound", "gradients", "hvps", "extra_seconds")
        record = {name: getattr(self, name) for name in names} | {"peak_memory_mib": self.memory}
        record["cpu_seconds"] = statistics.median(self.cpu) if self.cpu else None
        record["wall_seconds"] = statistics.median(self.wall) if self.wall else None
        return record | {"calls": len(self.cpu)}


def climb(library: str, ladder: Ladder, true: Tensor, *, levels: Sequence[float], cap: float) -> list[Row]:
    """Every second setting, each timed once, then those between one that fails a level and one that passes it.

    Args:
        library: for the rows.
        ladder: the settings; the first that is tried is called once more before, to warm up.
        true: the hypergradient.
        levels: relative errors of interest; below the smallest no tighter setting is tried.
        cap: CPU seconds of a call after which no tighter setting is tried.
    """
    settings = list(ladder.settings())
    rows: dict[int, Row] = {}
    best: list[float] = []
    for place in sorted({*range(1, len(settings), 2), len(settings) - 1}):
        row = rows[place] = _try(library, ladder.method, settings[place], true, warm=not rows)
        if row.error is None:
            break
        best.append(min([row.error, *best[-1:]]))
        if row.error <= min(levels):
            break
        if row.seconds > cap:
            row.note = f"cut off: over {cap:g} CPU seconds"
            break
        if len(best) > STALLED_AFTER and not best[-1] < best[-1 - STALLED_AFTER]:
            row.note = "cut off: its error no longer falls"
            break
    for level in levels:
        passing = [place for place, row in rows.items() if row.error is not None and row.error <= level]
        before = min(passing, default=0) - 1
        if before >= 0 and before not in rows:
            rows[before] = _try(library, ladder.method, settings[before], true, warm=False)
    return [rows[place] for place in sorted(rows)]


def _try(library: str, method: str, setting: Setting, true: Tensor, *, warm: bool) -> Row:
    row = Row(library, method, setting.name, compute=setting.compute, measure_memory=setting.memory)
    try:
        if warm:
            start = time.perf_counter()
            setting.compute()
            row.extra_seconds = time.perf_counter() - start
        answer = row.time()
    except Exception as error:  # somebody else's code: a row of the table, not the end of it
        return Row(library, method, setting.name, note=f"raised {type(error).__name__}: {error}")
    if warm:
        row.extra_seconds = max(0.0, row.extra_seconds - row.wall[0])
    row.error = float((answer.gradient.cpu().double() - true).norm() / true.norm())
    row.bound, row.gradients, row.hvps = answer.bound, answer.gradients, answer.hvps
    return row


def fastest(rows: Iterable[Row], level: float) -> Row | None:
    """The row with the least CPU time among those that are right to ``level``."""
    passing = [row for row in rows if row.error is not None and row.error <= level]
    return min(passing, key=lambda row: row.seconds, default=None)


def measure(
    ladders: dict[str, Callable[[], list[Ladder]]],
    true: Tensor,
    *,
    levels: Sequence[float],
    repeats: int,
    cap: float,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """All rows of one workload.

    Args:
        ladders: of every library, made when its turn comes.
        true: the hypergradient.
        levels: relative errors of interest.
        repeats: timed calls of the fastest settings.
        cap: CPU seconds of a call after which no tighter setting is tried.
        say: told what was found so far, line by line.
    """
    rows: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library, make in ladders.items():
            found: list[Row] = []
            try:
                for ladder in make():
                    found += climb(library, ladder, true, levels=levels, cap=cap)
            except Exception as error:  # an old library may fail in many ways to load beside new ones
                found.append(Row(library, "", "", f"raised {type(error).__name__}: {error}"))
            rows += found
            for level in levels:
                best = fastest(found, level)
                words = "nothing passes" if best is None else f"{best.seconds:.3f} s  {best.method}; {best.setting}"
                say(f"  {library}, {level:g}: {words}")
        chosen = _chosen(rows, levels)
        for _ in range(repeats - 1):
            for row in chosen:
                row.time()
        for row in chosen:
            row.memory = row.measure_memory() if row.measure_memory else peak(row.compute)
    return rows


def _chosen(rows: list[Row], levels: Sequence[float]) -> list[Row]:
    """The fastest two of every library at every level."""
    chosen: list[Row] = []
    for library in dict.fromkeys(row.library for row in rows):
        for level in levels:
            others = [row for row in rows if row.library == library]
            for _ in range(2):
                best = fastest(others, level)
                if best is None:
                    break
                others.remove(best)
                if best not in chosen:
                    chosen.append(best)
    return chosen
