"""Training: a run that is stopped, killed or damaged at any moment goes on bit for bit; all it writes can be read."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bilevel_imaging.cost import Cost
from bilevel_imaging.errors import CheckpointError
from bilevel_imaging.training import CheckpointStore, Trainer, load_latest, read_checkpoint, read_metrics
from bilevel_imaging.training import checkpoints as checkpoint_module
from bilevel_imaging.training.metrics_log import truncate_metrics
from bilevel_imaging.training.progress import Progress, format_interval
from bilevel_imaging.training.run_log import step_record
from bilevel_imaging.upper_level.base import StepReport, UpperLevelMethod

ROOT = Path(__file__).resolve().parent.parent


class NoisyQuadratic:
    """1/2 ||theta - target||^2 with noise from every source of randomness and a warm start that matters."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.theta = {
            "regularizer.log_weight": torch.zeros((), dtype=dtype, requires_grad=True),
            "regularizer.filters": torch.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3).requires_grad_(),
        }
        self.order = torch.Generator().manual_seed(5)
        self.warm = torch.zeros(4, dtype=dtype)
        self.pause = 0.0

    def noise(self) -> float:
        order = torch.randperm(4, generator=self.order)
        self.warm = 0.9 * self.warm + 0.1 * torch.randn(4, dtype=self.warm.dtype)[order]
        return float(self.warm[0]) + 0.1 * random.gauss(0, 1) + 0.1 * float(np.random.standard_normal())

    def loss(self) -> float:
        return float(sum(0.5 * (t.detach() - 1).square().sum() for t in self.theta.values()))

    def state_dict(self) -> dict:
        return {"warm": self.warm}

    def load_state_dict(self, state: dict) -> None:
        self.warm = state["warm"].clone()


class Momentum(UpperLevelMethod):
    """Gradient descent with momentum; NaN at a chosen step, a stop at a chosen step."""

    def __init__(self, nan_at: int = -1, stop_at: int = -1) -> None:
        self.velocity: dict[str, torch.Tensor] = {}
        self.count = 0
        self.nan_at, self.stop_at = nan_at, stop_at

    def step(self, objective: NoisyQuadratic) -> StepReport:
        time.sleep(objective.pause)
        self.count += 1
        noise = objective.noise()
        for name, tensor in objective.theta.items():
            grad = tensor.detach() - 1 + 0.3 * noise
            self.velocity[name] = 0.5 * self.velocity.get(name, torch.zeros_like(grad)) + grad
            with torch.no_grad():
                tensor.sub_(0.02 * self.velocity[name])
        loss = math.nan if self.count == self.nan_at else objective.loss()
        return StepReport(
            loss=loss,
            loss_lower=loss - 0.01,
            loss_upper=loss + 0.01,
            grad_norm=1.0,
            error_bound=math.inf if self.count % 2 else 0.1,
            certified=self.count % 2 == 0,
            reason="" if self.count % 2 == 0 else "smoothness unknown",
            error_tol=1e-3,
            residual_tol=1e-4,
            step_size=0.02,
            accepted=True,
            refinements=1,
            backtracks=0,
            param_change=0.1,
            cost=Cost(gradients=3, hvps=2, mixed_products=1),
            stop="converged" if self.count == self.stop_at else "",
            extra={"lower/iterations_mean": 7.0, "radius": 0.5},
        )

    def state_dict(self) -> dict:
        return {"velocity": self.velocity, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.velocity = {name: tensor.clone() for name, tensor in state["velocity"].items()}
        self.count = state["count"]


def make(folder: Path, steps: int = 20, **options) -> Trainer:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    objective = options.pop("objective", None) or NoisyQuadratic()
    method = options.pop("method", None) or Momentum()
    defaults = {"checkpoint_every": 4, "tensorboard": False, "progress": False}
    settings = {**defaults, **options}
    return Trainer(objective, method, folder, max_steps=steps, generators={"order": objective.order}, **settings)


def final(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.objective.theta.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].numpy().tobytes() == b[name].numpy().tobytes(), name


def scramble() -> None:
    """What a new process would have drawn already."""
    torch.rand(3), random.random(), np.random.rand()


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, torch.Tensor]:
    trainer = make(tmp_path_factory.mktemp("reference") / "run", checkpoint_every=1000)
    result = trainer.fit()
    assert (result.status, result.steps) == ("completed", 20)
    assert result.cost.gradients == 60 and result.summary["refinements"] == 20
    assert result.loss_interval == pytest.approx((result.loss - 0.01, result.loss + 0.01))
    return final(trainer)


@pytest.mark.parametrize("first", [0, 1, 7, 8])
def test_resume_equals_uninterrupted(first, reference, tmp_path):
    make(tmp_path, first).fit()
    trainer = make(tmp_path)
    scramble()
    assert trainer.resume() == first
    result = trainer.fit()
    assert_same(final(trainer), reference)
    assert result.cost.gradients == 60
    assert result.summary["first_loss"] == read_metrics(tmp_path / "metrics.jsonl")[0]["loss"]
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 21))
    assert [p.name for p in trainer.store.paths()] == ["step-00000016.pt", "step-00000020.pt"]
    assert result.checkpoint == trainer.store.path(20)


def test_validation_and_schedule_change_nothing(reference, tmp_path):
    trainer = make(tmp_path, checkpoint_every=1, validate_every=1)

    def careless() -> dict[str, float]:
        scramble()
        trainer.objective.noise()
        with torch.no_grad():
            trainer.objective.theta["regularizer.filters"].add_(1)
        return {"psnr": 30.0}

    trainer.validate = careless
    result = trainer.fit()
    assert_same(final(trainer), reference)
    assert result.validation == {"psnr": 30.0}


def test_second_fit_in_memory_goes_on(reference, tmp_path):
    trainer = make(tmp_path, 5)
    trainer.fit()
    trainer.max_steps = 20
    assert trainer.fit().steps == 20
    assert_same(final(trainer), reference)


def test_stop_reason_survives_resume(tmp_path):
    result = make(tmp_path, method=Momentum(stop_at=6)).fit()
    assert (result.status, result.reason, result.steps) == ("stopped", "converged", 6)
    trainer = make(tmp_path)
    trainer.resume()
    again = trainer.fit()
    assert (again.status, again.steps) == ("stopped", 6)


def test_used_folder_is_refused(tmp_path):
    make(tmp_path, 2).fit()
    with pytest.raises(ValueError, match="already holds a run"):
        make(tmp_path, 2).fit()


def test_resume_without_checkpoint(reference, tmp_path):
    with pytest.raises(CheckpointError, match="No checkpoint in"):
        make(tmp_path).resume()
    metrics = tmp_path / "metrics.jsonl"
    lost = '{"kind": "step", "step": 7}\n'
    metrics.write_text(lost)
    with pytest.raises(CheckpointError, match=r"checkpoints: no checkpoint, but metrics.jsonl has 1 steps"):
        make(tmp_path).resume(missing_ok=True)
    assert metrics.read_text() == lost
    metrics.write_text('{"kind": "validation", "step": 0}\n{"step": 1, "lo')
    trainer = make(tmp_path)
    assert trainer.resume(missing_ok=True) == 0
    assert metrics.read_text() == ""
    trainer.fit()
    assert_same(final(trainer), reference)


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "text"])
def test_damaged_newest_checkpoint_falls_back(damage, reference, tmp_path):
    make(tmp_path, 8).fit()
    path = CheckpointStore(tmp_path / "checkpoints").path(8)
    data = bytearray(path.read_bytes())
    if damage == "flip":  # inside the parameters, where the file stays readable
        position = data.find(load_latest(path.parent)[0]["theta"]["regularizer.filters"].numpy().tobytes())
        assert position > 0
        data[position] ^= 1
    path.write_bytes({"truncate": data[: len(data) // 2], "empty": b"", "flip": data, "text": b"hello"}[damage])
    with pytest.raises(CheckpointError, match=f"The checkpoint .*{path.name} is damaged: .*[.]$"):
        read_checkpoint(path)
    trainer = make(tmp_path)
    with pytest.warns(UserWarning, match=f"{path.name} is damaged: .*[.] Going back to step-00000004.pt[.]$"):
        assert trainer.resume() == 4
    trainer.fit()
    assert_same(final(trainer), reference)
    assert (path.parent / "step-00000008.pt.damaged").exists()


def test_a_file_without_a_state_is_no_checkpoint(tmp_path):
    torch.save({"format": 1, "digest": ""}, tmp_path / "step-1.pt")
    with pytest.raises(CheckpointError, match="step-1.pt is incomplete"):
        read_checkpoint(tmp_path / "step-1.pt")


def test_all_checkpoints_damaged(tmp_path):
    make(tmp_path, 4).fit()
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="No readable checkpoint.*step-00000004.pt is damaged.*Start a new run"):
        make(tmp_path).resume()


def test_checkpoints_that_can_not_be_read_are_not_called_damaged(tmp_path):
    with pytest.raises(CheckpointError, match="Cannot read the checkpoint .*step-1.pt: No such file or directory.$"):
        read_checkpoint(tmp_path / "step-1.pt")


def test_mismatch_is_named_and_changes_nothing(tmp_path):
    make(tmp_path, 4).fit()
    other = NoisyQuadratic(torch.float32)
    other.theta["regularizer.extra"] = torch.zeros(2)
    trainer = make(tmp_path, objective=other)
    with pytest.raises(CheckpointError, match=r"regularizer.extra is missing.*float64 in the file.*float32"):
        trainer.resume()
    assert other.theta["regularizer.log_weight"] == 0

    class Other(Momentum):
        pass

    with pytest.raises(CheckpointError, match="method Momentum. Got Other"):
        make(tmp_path, method=Other()).resume()


def test_state_that_cannot_be_saved_is_named(tmp_path):
    objective = NoisyQuadratic()
    objective.state_dict = lambda: {"cache": [object()]}
    with pytest.raises(CheckpointError, match=r"object at state\['objective'\]\['cache'\]\[0\]"):
        make(tmp_path, objective=objective).fit()


def test_truncated_metrics(reference, tmp_path):
    make(tmp_path, 8, validate=lambda: {"psnr": math.inf}, validate_every=4).fit()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert lines[1]["error_bound"] is None and lines[0] == {"kind": "validation", "step": 0, "psnr": None}
    path.write_bytes(whole + b'{"kind": "step", "step": 9}\n{"kind": "st')
    trainer = make(tmp_path)
    trainer.resume()
    assert path.read_bytes() == whole
    trainer.fit()
    assert_same(final(trainer), reference)


def test_damage_in_the_middle_of_the_metrics_costs_that_line_alone(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [json.dumps({"kind": "step", "step": step}).encode() + b"\n" for step in range(1, 9)]
    lines[2] = lines[2].replace(b"step", b"st\xffp", 1)
    path.write_bytes(b"".join(lines) + b"\x00\x00")
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 4, 5, 6, 7, 8]
    with pytest.warns(UserWarning, match=r"m.jsonl: damaged lines, kept .*: 1\."):
        assert [r["step"] for r in truncate_metrics(path, 6, -1)] == [1, 2, 4, 5, 6]
    assert path.read_bytes() == b"".join(lines[:6])
    path.write_bytes(lines[0] + b"damaged\n" + lines[5])
    truncate_metrics(path, 1, -1)
    assert path.read_bytes() == lines[0]


@pytest.mark.parametrize("fails", ["fsync", "write"])
def test_full_disk_keeps_the_previous_checkpoint(fails, reference, tmp_path, monkeypatch, capsys):
    trainer = make(tmp_path)
    original = {"fsync": os.fsync, "write": os.write}[fails]

    def full(*arguments):
        if 4 < trainer.step <= 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(checkpoint_module.os, fails, full)
    inner = trainer.method.step
    kept = []

    def step(objective):
        kept.append([p.name for p in trainer.store.paths()])
        return inner(objective)

    trainer.method.step = step
    assert trainer.fit().status == "completed"
    assert kept[13] == ["step-00000000.pt", "step-00000004.pt"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert [p.name for p in trainer.store.paths()] == ["step-00000016.pt", "step-00000020.pt"]
    lines = [line for line in capsys.readouterr().err.splitlines() if "Checkpoint" in line]
    assert len(lines) == 2 and "step 8 not saved" in lines[0] and "that of step 4 is kept" in lines[0]
    assert "from step 16 on" in lines[1]
    assert_same(final(trainer), reference)


def test_metrics_wait_for_room(tmp_path):
    from bilevel_imaging.training.metrics_log import MetricsLog

    class Full:
        """A file that takes 5 bytes, then is full."""

        def __init__(self, file) -> None:
            self.file, self.left, self.fileno, self.close = file, 5, file.fileno, file.close

        def write(self, data) -> int:
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            count = self.file.write(data[: self.left])
            self.left -= count
            return count

    log = MetricsLog(tmp_path / "m.jsonl")
    log.append({"step": 1})
    real, log._file = log._file, Full(log._file)
    with pytest.raises(OSError):
        log.append({"step": 2})
    log._file = real
    log.append({"step": 3})
    log.close()
    assert [r["step"] for r in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3]


def test_not_finite_stops_with_the_last_good_checkpoint(tmp_path):
    trainer = make(tmp_path, method=Momentum(nan_at=7))
    result = trainer.fit()
    assert result.status == "diverged" and "step 7" in result.reason and "loss" in result.reason
    assert "step 4" in result.reason and result.checkpoint == trainer.store.path(4)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] is None
    with pytest.raises(ValueError, match="resume"):
        trainer.fit()
    assert trainer.resume() == 4


def test_an_error_after_the_first_step_is_about_theta(tmp_path):
    """Solvers refuse a theta that has run away; what was wrong from the start is a mistake of the caller."""

    class Runaway(Momentum):
        def __init__(self, after: int) -> None:
            super().__init__()
            self.after = after

        def step(self, objective):
            if self.count == self.after:
                raise error
            return super().step(objective)

    error = ValueError("Expected residual_tol >= 0. Got nan.")
    trainer = make(tmp_path / "later", method=Runaway(6))
    result = trainer.fit()
    assert result.status == "diverged" and result.reason.startswith("Stopped at step 6: Expected residual_tol >= 0. ")
    assert "step 4 in" in result.reason and "smaller step size" in result.reason
    with pytest.raises(ValueError, match="resume"):
        trainer.fit()
    assert trainer.resume() == 4
    with pytest.raises(ValueError, match="residual_tol"):
        make(tmp_path / "first", method=Runaway(0)).fit()

    def validate():
        if trainer.step == 8:
            raise error
        return {}

    trainer = make(tmp_path / "validation", validate=validate, validate_every=1)
    assert trainer.fit().status == "diverged" and trainer.store.last_valid == trainer.store.path(4)
    with pytest.raises(ValueError, match="resume"):
        trainer.fit()
    error = CheckpointError("full")
    with pytest.raises(CheckpointError):
        make(tmp_path / "other", method=Runaway(6)).fit()


def test_tensorboard_tags_and_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def images() -> dict[str, torch.Tensor]:
        gt = torch.rand(2, 1, 8, 9)
        return {"gt": gt, "measurement": torch.randn(2, 1, 5, 4), "reconstruction": gt + 0.1, "params/filters": gt[0]}

    def run(steps: int) -> Trainer:
        return make(
            tmp_path,
            steps,
            tensorboard=True,
            validate=lambda: {"psnr": 30.0, "ssim": 0.9, "psnr_noisy": 20.0},
            validate_every=4,
            log_images=images,
            config={"upper": {"method": "maid|x"}, "seed": None},
        )

    first = run(7)
    first.max_steps = 7
    first.fit()
    CheckpointStore(tmp_path / "checkpoints").path(7).unlink()  # as if killed after step 7, before its checkpoint
    trainer = run(9)
    assert trainer.resume() == 4
    trainer.fit()
    board = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    board.Reload()
    tags = board.Tags()
    expected = {f"upper/{n}" for n in "loss loss_lower_bound loss_upper_bound step_size grad_norm param_change".split()}
    expected |= {f"hypergrad/{n}" for n in "norm error_bound relative_bound trusted".split()}
    expected |= {f"accuracy/{n}" for n in "eps delta log10_eps log10_delta n_refinements".split()}
    expected |= {f"cost/{n}" for n in "lower_grads hvps jvps forward_ops seconds loss_over_work".split()}
    expected |= {"val/psnr", "val/ssim", "val/psnr_noisy", "params/regularizer.log_weight", "lower/iterations_mean"}
    assert expected | {"hparam/val_psnr", "upper/radius"} <= set(tags["scalars"])
    assert set(tags["images"]) == {"val/gt_measurement_reconstruction_error", "params/filters"}
    assert "params/regularizer.filters" in tags["histograms"]
    assert [e.step for e in board.Scalars("upper/loss")] == list(range(1, 10))
    assert sorted(e.step for e in board.Scalars("cost/loss_over_work")) == [6 * k for k in range(1, 10)]
    assert {"config/text_summary", "custom_scalars__config__"} <= set(tags["tensors"])
    assert b"maid\\|x" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    hparams = board.summary_metadata["_hparams_/session_start_info"]
    assert hparams.plugin_data.plugin_name == "hparams"
    assert not [p for p in tmp_path.iterdir() if p.is_dir() and p.name not in ("checkpoints", "pictures")]
    for name in ("reconstructions.png", "training_curves.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_progress_lines(tmp_path, capsys):
    assert format_interval(12.341, 12.30, 12.36) == "12.341 [12.300, 12.360]"
    assert format_interval(1.0, -math.inf, math.inf) == "1 [not certified]"
    assert format_interval(0.0, 0.0, 0.0) == "0 [0, 0]"
    objective, method = NoisyQuadratic(), Momentum()
    bar = Progress(3)
    for step in (1, 2, 3):
        record = step_record(method.step(objective), step, Cost(), 1.0, objective.theta)
        bar.update(record, {"psnr": 31.5})
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("step 1/3: loss ") and lines[1].startswith("step 3/3")
    assert "PSNR 31.50, eps 1.0e-03, delta 1.0e-04" in lines[0] and lines[0].endswith("trusted no, 1 s")


# --- Real signals, in a process of their own -------------------------------------------------------------------------


def start(folder: Path, steps: int, pause: float) -> subprocess.Popen:
    """This file as a program that resumes if it can, as a user's script would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-W", "error", __file__, str(folder), str(steps), str(pause)]
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for_steps(process: subprocess.Popen, folder: Path, more_than: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        records = read_metrics(folder / "metrics.jsonl")
        if records and records[-1]["step"] > more_than:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step seen: {process.communicate()}")


def newest_step(folder: Path) -> int:
    return load_latest(folder / "checkpoints")[0]["step"]


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path):
    steps, done = 150, 0
    for _ in range(3):
        process = start(tmp_path / "killed", steps, 0.01)
        wait_for_steps(process, tmp_path / "killed", done)
        time.sleep(random.uniform(0, 0.4))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        done = newest_step(tmp_path / "killed")
    process = start(tmp_path / "killed", steps, 0.0)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "completed" in out, err
    whole = make(tmp_path / "whole", steps, checkpoint_every=1000)
    whole.fit()
    saved = load_latest(tmp_path / "killed" / "checkpoints")[0]
    assert saved["step"] == steps
    assert_same(saved["theta"], final(whole))
    assert [r["step"] for r in read_metrics(tmp_path / "killed" / "metrics.jsonl")] == list(range(1, steps + 1))


@pytest.mark.slow
def test_ctrl_c_saves_and_a_second_one_stops_at_once(tmp_path):
    process = start(tmp_path, 20, 0.3)
    wait_for_steps(process, tmp_path, 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "interrupted" in out and f"--resume {tmp_path}" in err
    done = newest_step(tmp_path)
    assert done == read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] >= 2

    process = start(tmp_path, 20, 1.0)  # steps so long that both signals fall into one
    wait_for_steps(process, tmp_path, done)
    time.sleep(0.3)  # well into the next step: a signal between two steps ends the run by itself
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    assert newest_step(tmp_path) >= done


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have switched it off
    folder, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    trainer = make(folder, steps, checkpoint_every=2, progress=True)
    trainer.objective.pause = pause
    scramble_after_resume = trainer.resume(missing_ok=True) > 0
    print("resumed" if scramble_after_resume else "new", trainer.fit().status)


if __name__ == "__main__":
    main()


def test_an_interrupt_waits_for_an_import(monkeypatch):
    from bilevel_imaging.training.interrupts import uninterrupted

    reached = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("the end")
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_disk_that_is_full_from_the_start_ends_the_run(tmp_path, monkeypatch):
    trainer = make(tmp_path)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module.os, "fsync", full)
    with pytest.raises(CheckpointError, match="Cannot write checkpoints to .*No space left on device"):
        trainer.fit()
