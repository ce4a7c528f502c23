"""Several processes: the same numbers as one, the same files, and an end for all of them whatever happens to one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import bilevel_imaging as bi
from bilevel_imaging.cli import train_main
from bilevel_imaging.data import Degradation, ImagePairs, RandomPatches, photographs
from bilevel_imaging.hypergradients import Hypergradient
from bilevel_imaging.lower_solvers import NewtonCG
from bilevel_imaging.training import RandomPatchObjective, Trainer, load_latest, read_metrics
from bilevel_imaging.training.distributed import (
    ALONE,
    Processes,
    joined,
    shared_batch_size,
    shares,
)
from bilevel_imaging.training.warm_starts import DiskWarmStarts
from bilevel_imaging.upper_level import MAID, FirstOrder, SingleLoop

ROOT = Path(__file__).resolve().parent.parent
SIZE = 2
STEPS = 4
IMAGES = {name: image for name, image in photographs(part="train").items() if name in ("astronaut", "coffee")}


class Several(Processes):
    """As many as asked for, for functions that do not talk."""

    def __init__(self, size: int) -> None:
        self.size = size


# ---------------------------------------------------------------------------------------------- who gets what


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_hold_everything_once_and_are_even(size):
    loads = [5.0, 1.0, 4.0, 4.0, 2.0, 2.0, 3.0]
    result = shares(loads, size)
    assert sorted(sum(result, [])) == list(range(7)) and all(positions == sorted(positions) for positions in result)
    sums = [sum(loads[i] for i in positions) for positions in result]
    assert max(sums) - min(sums) <= max(loads)
    assert shares([1.0] * 6, 3) == [[0, 3], [1, 4], [2, 5]]


def test_batches_become_as_small_as_the_processes_need():
    for images, minibatch, given, size, expected in (
        (6, None, 64, 1, 64),  # alone: as it is
        (6, None, 64, 2, 3),
        (5, None, 64, 4, 1),  # two and two and one would leave a process without work
        (7, None, 64, 2, 4),
        (6, None, 2, 2, 2),  # uneven, but asked for
        (8, None, 7, 2, 4),  # too uneven
        (8, None, 2, 2, 2),
        (6, 5, 64, 2, 3),
    ):
        pairs = make_pairs(images)
        found = shared_batch_size(pairs, minibatch, given, Several(size), fixed=False)
        assert found == expected, (images, minibatch, given, size)


def test_more_processes_than_images_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^Expected at most 5 processes, the number of training patches\. Got 6\.$"):
        shared_batch_size(make_pairs(5), None, 64, Several(6), fixed=False)
    with pytest.raises(ValueError, match=r"^Expected at most 3 processes, the number of training patches in upper"):
        shared_batch_size(make_pairs(5), 3, 64, Several(4), fixed=False)
    with pytest.raises(ValueError, match=r"^Expected at most 2 processes, the number of batches of this run"):
        shared_batch_size(make_pairs(5), None, 3, Several(3), fixed=True)


# ---------------------------------------------------------------------------------------------- the same numbers


def make_pairs(count: int, *, uneven: bool = False) -> ImagePairs:
    image = IMAGES["astronaut"]
    crops = {str(i): image[:, 40 * i : 40 * i + 16, 60 : 76 + 4 * (uneven and i % 2)] for i in range(count)}
    return ImagePairs.build(crops, Degradation(sigma=0.1, seed=3))


def energy() -> bi.VariationalEnergy:
    return bi.VariationalEnergy(bi.TotalVariation(weight=0.2, smoothing=0.05))


def full(processes: Processes, **options: Any) -> bi.BilevelObjective:
    """Five images of two shapes in batches of two: three batches that nobody can halve."""
    objective = bi.BilevelObjective(energy(), make_pairs(5, uneven=True), batch_size=2, **options)
    objective.spread(processes)
    return objective


def minibatches(processes: Processes, **options: Any) -> bi.BilevelObjective:
    """Minibatches of three and two, in batches of two and one."""
    generator = torch.Generator().manual_seed(1)
    objective = bi.BilevelObjective(energy(), make_pairs(5), batch_size=2, minibatch=3, generator=generator, **options)
    objective.spread(processes)
    return objective


def on_disk(processes: Processes, folder: Path) -> bi.BilevelObjective:
    pairs = make_pairs(5)
    shapes = {i: x.shape for i, x in enumerate(pairs.x)}
    return minibatches(processes, warm=DiskWarmStarts(folder / f"of {processes.size}", shapes, torch.float64))


def random_patches(processes: Processes) -> RandomPatchObjective:
    patches = RandomPatches(IMAGES, Degradation(sigma=0.1), 16, 3, seed=2)
    objective = RandomPatchObjective(energy(), patches, batch_size=1)
    objective.spread(processes)
    return objective


def plain(h: Hypergradient) -> dict[str, Any]:
    """All numbers of a hypergradient but its time."""
    names = ("bound", "relative_bound", "certified", "reason", "bounds", "terms", "loss", "loss_interval")
    tensors = {name: getattr(h, name) for name in ("grad", "component_bounds")}
    tensors |= {name: pair and pair[0] for name in ("before_polish", "verified_by") for pair in [getattr(h, name)]}
    return {
        **{name: getattr(h, name) for name in names},
        **{name: value and {n: t.tolist() for n, t in value.items()} for name, value in tensors.items()},
        "pairs": [pair and pair[1] for pair in (h.before_polish, h.verified_by)],
        "samples": h.sample_bounds.tolist(),
        "reached": [h.distance, h.residual],
        "cost": {**asdict(h.cost), "seconds": 0.0},
    }


def numbers(objective: Any, method: Any, steps: int = STEPS) -> list[Any]:
    """Everything that a method sees and does."""
    seen: list[Any] = []
    hypergradient, value = objective.hypergradient, objective.value

    def watched(**accuracy: float) -> Hypergradient:
        h = hypergradient(**accuracy)
        seen.append(plain(h))
        return h

    def watched_value(error_tol: float) -> Any:
        result = value(error_tol)
        seen.append([result.value, result.lower, result.upper, {**asdict(result.cost), "seconds": 0.0}])
        return result

    objective.hypergradient, objective.value = watched, watched_value
    for _ in range(steps):
        method.step(objective)
        seen.append({name: tensor.tolist() for name, tensor in objective.theta.items()})
    return seen


def polished(processes: Processes) -> list[Any]:
    objective = full(processes, certificate="polished")
    return [plain(objective.hypergradient(error_tol=1e-2, residual_tol=1e-2)) for _ in range(2)]


def adam() -> FirstOrder:
    return FirstOrder("Adam", lr=0.1)


def scenarios(folder: Path) -> dict[str, Callable[[Processes], Any]]:
    return {
        "MAID": lambda processes: numbers(full(processes), MAID()),
        "Adam": lambda processes: numbers(full(processes), adam()),
        "minibatches": lambda processes: numbers(minibatches(processes), adam()),
        "warm starts on the disk": lambda processes: numbers(on_disk(processes, folder), adam()),
        "random patches": lambda processes: numbers(random_patches(processes), adam()),
        "polished": polished,
    }


NAMES = list(scenarios(Path()))


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict[str, Any]]:
    """What two processes have seen in all that ``main`` lets them do."""
    folder = tmp_path_factory.mktemp("together")
    started = launch([__file__, str(folder)])
    outputs = ended(started, 240)
    assert [process.returncode for process in started] == [0, 7], outputs
    return [{**torch.load(folder / f"{rank}.pt", weights_only=False), "folder": folder} for rank in range(SIZE)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_see_the_numbers_of_one(name, together, tmp_path):
    alone = scenarios(tmp_path)[name](ALONE)
    assert len(alone) >= 2
    for seen in together:
        assert seen[name] == alone


@pytest.mark.slow
def test_images_are_shared_and_warm_starts_stay(together):
    owned = [seen["owned"] for seen in together]
    assert all(owned) and sorted(owned[0] + owned[1]) == list(range(5))


# ---------------------------------------------------------------------------------------------- runs


def trainer(processes: Processes, folder: Path, steps: int, objective: Any = None, **options: Any) -> Trainer:
    objective = full(processes) if objective is None else objective
    method = options.pop("method", None) or MAID()
    defaults = {"checkpoint_every": 1, "progress": False, "tensorboard": False}
    return Trainer(objective, method, folder, max_steps=steps, **{**defaults, **options})


def theta(run: Trainer) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in run.objective.theta.items()}


def resumed(processes: Processes, folder: Path) -> dict[str, Any]:
    """Two steps, then two more by another trainer."""
    trainer(processes, folder, STEPS // 2, validate=lambda: {"psnr": 1.0}, tensorboard=True).fit()
    run = trainer(processes, folder, STEPS, validate=lambda: {"psnr": 2.0}, tensorboard=True)
    assert run.resume() == STEPS // 2
    result = run.fit()
    assert result.validation == {"psnr": 2.0} and result.status == "completed"
    return theta(run)


def resumed_minibatches(processes: Processes, folder: Path) -> dict[str, Any]:
    trainer(processes, folder, 3, minibatches(processes), method=adam()).fit()
    run = trainer(processes, folder, 6, minibatches(processes), method=adam())
    assert run.resume() == 3
    run.fit()
    return theta(run)


@pytest.mark.slow
def test_resume_is_bit_for_bit_with_any_number_of_processes(together, tmp_path):
    whole = trainer(ALONE, tmp_path / "whole", STEPS)
    whole.fit()
    assert together[0]["resumed"] == together[1]["resumed"] == theta(whole)
    folder = together[0]["folder"] / "resumed"
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "step"] == [1, 2, 3, 4]
    assert [r["psnr"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "validation"] == [1, 1, 2]
    assert len(list(folder.glob("events.out.tfevents.*"))) == 2  # one for each fit, from the first process
    assert sorted(load_latest(folder / "checkpoints")[0]["objective"]["x"]) == list(range(5))
    longer = trainer(ALONE, folder, STEPS + 2)  # now by one process
    longer.resume()
    longer.fit()
    whole.max_steps = STEPS + 2
    whole.fit()
    assert theta(longer) == theta(whole)


@pytest.mark.slow
def test_resume_with_minibatches(together, tmp_path):
    whole = trainer(ALONE, tmp_path, 6, minibatches(ALONE), method=adam())
    whole.fit()
    assert together[0]["minibatches resumed"] == together[1]["minibatches resumed"] == theta(whole)


class Signalled(FirstOrder):
    """Asks its own process to end in the second step."""

    def step(self, objective: Any) -> Any:
        report = super().step(objective)
        if self.steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return report


def interrupted(processes: Processes, folder: Path) -> tuple[str, int, list[str]]:
    """A signal to the second process alone."""
    run = trainer(
        processes, folder, 50, method=Signalled() if processes.rank == 1 else FirstOrder(), checkpoint_every=9
    )
    result = run.fit()
    return result.status, result.steps, [path.name for path in run.store.paths()]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(together):
    for seen in together:
        assert seen["interrupted"] == ("interrupted", 2, ["step-00000000.pt", "step-00000002.pt"])


# ---------------------------------------------------------------------------------------------- failures


class Broken(NewtonCG):
    """Fails in the second process."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def solve(self, *args: Any, **options: Any) -> Any:
        if self.rank == 1:
            raise RuntimeError("a broken image")
        return super().solve(*args, **options)


def message(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def failures(processes: Processes, folder: Path) -> list[str]:
    """What each process hears of an error that only one of them makes."""

    def validate() -> dict[str, float]:
        raise OSError("no pictures")

    broken = full(processes, lower=Broken(processes.rank))
    followed = full(processes)
    return [
        message(lambda: broken.hypergradient(relative=0.1)),
        message(lambda: broken.value(1e-3)),
        message(trainer(processes, folder / "broken", 1, validate=validate).fit),
        message(lambda: processes.check_same("seed", lambda: processes.rank)),
        message(lambda: SingleLoop().step(followed)),
    ]


@pytest.mark.slow
def test_an_error_in_one_process_is_heard_of_in_all(together):
    first, second = (seen["failures"] for seen in together)
    assert first[:2] == ["ProcessError: process 1: a broken image"] * 2
    assert second[:2] == ["RuntimeError: a broken image"] * 2
    assert (first[2], second[2]) == ("OSError: no pictures", "ProcessError: process 0: no pictures")
    assert first[3] == second[3] == "ProcessError: Expected the same seed in all processes. Got others in process 1."
    assert first[4] == second[4] and first[4].startswith("ValueError: Expected one process for a method that")


@pytest.mark.slow
def test_the_death_of_a_process_is_noticed(together):
    assert "ProcessError: another process of this run has ended" in (together[0]["folder"] / "death").read_text()


# ---------------------------------------------------------------------------------------------- the command


SETTINGS = ["--data.patch_size", "16", "--data.patches_per_image", "1", "--data.eval_size", "32"]
SETTINGS += ["--problem.dtype", "float64", "--logging.evaluate", "false", "--upper.max_steps", "3"]


@pytest.mark.slow
def test_torchrun_trains_as_one_process_with_the_same_settings(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SIZE}"]
    command += [
        str(ROOT / "scripts" / "train.py"),
        "--output",
        str(tmp_path / "two"),
        "--data.max_images",
        "5",
        *SETTINGS,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert output.count("data.batch_size: 3 instead of 64") == output.count("Run folder") == 1
    assert train_main(["--config", str(tmp_path / "two" / "config.yaml"), "--output", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    for summary in (one, two):
        del summary["seconds"], summary["cost"]["seconds"]
    assert one == two


@pytest.mark.slow
def test_a_mistake_is_one_line_from_the_first_process(tmp_path):
    arguments = [str(ROOT / "scripts" / "train.py"), "--output", str(tmp_path / "run"), "--data.max_images", "1"]
    started = launch([*arguments, *SETTINGS])
    outputs = ended(started, 240)
    assert [process.returncode for process in started] == [2, 2]
    assert outputs == ["error: Expected at most 1 processes, the number of training patches. Got 2.\n", ""]
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- processes


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(arguments: list[str]) -> list[subprocess.Popen]:
    """Two processes as torchrun starts them."""
    port = free_port()
    return [start(arguments, rank, port) for rank in range(SIZE)]


def start(arguments: list[str], rank: int, port: int) -> subprocess.Popen:
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_WORLD_SIZE": str(SIZE)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(started: list[subprocess.Popen], timeout: float) -> list[str]:
    """Outputs of processes that must all end by themselves."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with joined("cpu") as processes:
        seen: dict[str, Any] = {name: run(processes) for name, run in scenarios(folder).items()}
        objective = full(processes)
        objective.hypergradient(relative=0.1)
        seen["owned"] = sorted(objective.state_dict()["x"])
        for name, run in (("resumed", resumed), ("interrupted", interrupted), ("failures", failures)):
            seen[name] = run(processes, folder / name)
        seen["minibatches resumed"] = resumed_minibatches(processes, folder / "minibatches resumed")
        torch.save(seen, folder / f"{processes.rank}.pt")
        if processes.rank == 1:
            os._exit(7)
        (folder / "death").write_text(message(partial(objective.hypergradient, relative=0.1)))
        os._exit(0)  # there is nobody to wait for at the end


if __name__ == "__main__":
    main()
