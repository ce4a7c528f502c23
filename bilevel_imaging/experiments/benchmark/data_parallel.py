"""What torchrun runs to measure data-parallel training: prints speeds as JSON.

torchrun --nproc-per-node 2 -m bilevel_imaging.experiments.benchmark.data_parallel
"""

from __future__ import annotations

import json
import time

import torch

from bilevel_imaging.experiments.benchmark.workloads import WORKLOADS, Task
from bilevel_imaging.training.distributed import ALONE, Processes, joined
from bilevel_imaging.training.objective import BilevelObjective
from bilevel_imaging.upper_level import FirstOrder

STEPS, WARM_UP, ROUNDS = 8, 2, 3
BATCH = 8
RATE = 0.02

Speed = tuple[float, float]
"""Steps per wall second, and CPU seconds per wall second."""


def main() -> None:
    """In turn, so that what else the machine does falls on all alike: one process, all together, all by themselves."""
    torch.set_num_threads(1)
    task = WORKLOADS["W1"].build()
    rounds: list[dict[str, Speed]] = []
    with joined("cpu") as processes:
        for _ in range(ROUNDS):
            alone = processes.gather(lambda: _speed(task, ALONE) if processes.rank == 0 else (0.0, 0.0))[0]
            processes.gather(lambda: None)
            mine = _speed(task, processes)
            together = processes.gather(lambda mine=mine: mine)
            apart = processes.gather(lambda: _speed(task, ALONE))
            rounds.append(
                {
                    "one_process": alone,
                    "all_processes": (mine[0], sum(used for _, used in together)),
                    "independent_runs": (sum(rate for rate, _ in apart), sum(used for _, used in apart)),
                }
            )
        if processes.rank == 0:
            print(json.dumps(rounds), flush=True)


def _speed(task: Task, processes: Processes) -> Speed:
    """Of Adam on total variation, 16 images of 128x128 in two batches, whoever solves them."""
    objective = BilevelObjective(task.at(task.theta, task.x0).energy, task.pairs(), batch_size=BATCH)
    objective.spread(processes)
    method = FirstOrder("Adam", lr=RATE)
    for _ in range(WARM_UP):
        method.step(objective)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        method.step(objective)
    wall = time.perf_counter() - start
    return STEPS / wall, (time.process_time() - cpu) / wall


if __name__ == "__main__":
    main()
