"""Everything a run needs to continue bit for bit, as one plain dict: theta, method, warm starts, random numbers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.errors import CheckpointError
from bilevel_imaging.upper_level.base import Objective, UpperLevelMethod

STATE_KEYS = ("step", "theta", "method", "objective", "cost", "seconds", "rng", "generators", "run")  # of every version


class TrainableObjective(Objective, Protocol):
    """An objective that a trainer can save and restore.

    ``theta`` holds the live tensors: methods and the restore below change them in place. They are saved separately,
    so the state below is everything else on which the next step depends: warm starts by image, batch order, counters.

    An objective that several processes share says so by an attribute ``processes``. It may have a method
    ``whole_state_dict``, called in all of them together, that returns the state of all of them in the first one.
    """

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, tensors, lists and dicts; must not change anything. May return live tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; tensors may come on the CPU when the device of the run is missing.

        Raises:
            ValueError: if keys are missing or do not fit.
        """
        ...


def to_plain(value: Any, where: str = "state") -> Any:
    """A copy of nested containers that ``torch.load(weights_only=True)`` reads back; tensors are detached, not copied.

    Args:
        value: numbers, strings, tensors, NumPy scalars, lists, tuples and dicts of these.
        where: name for messages.

    Raises:
        CheckpointError: for any other type, naming the place.
    """
    if isinstance(value, Tensor):
        tensor = value.detach()
        # A view would drag the whole storage it looks into along.
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if whole else tensor.clone()
    if isinstance(value, Mapping):
        return {key: to_plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise CheckpointError(
        f"Expected numbers, strings, tensors, lists and dicts in the state to be saved. Got {type(value).__name__} at "
        f"{where}. Convert it in state_dict()."
    )


def digest(state: Any) -> str:
    """SHA-256 of every bit of a plain state, so that damage that leaves the file readable is found."""
    hasher = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            hasher.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            hasher.update(memoryview(flat.view(torch.uint8).numpy()))
        elif isinstance(value, dict):
            hasher.update(f"dict {len(value)};".encode())
            for key, item in value.items():
                feed(key)
                feed(item)
        elif isinstance(value, list | tuple):
            hasher.update(f"{type(value).__name__} {len(value)};".encode())
            for item in value:
                feed(item)
        else:
            hasher.update(f"{type(value).__name__} {value!r};".encode())

    feed(state)
    return hasher.hexdigest()


def clone(state: Any) -> Any:
    """A plain state whose tensors are independent copies."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: clone(item) for key, item in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(clone(item) for item in state)
    return state


def rng_state() -> dict[str, Any]:
    """States of all global random number generators: PyTorch (CPU and, once used, CUDA), ``random``, NumPy."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else [],
        "python": [version, list(internal), gauss_next],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what ``rng_state`` returned. CUDA states are restored on as many devices as there are."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        for device, value in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(value.cpu(), device)
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))


def full_state(
    objective: TrainableObjective,
    method: UpperLevelMethod,
    *,
    step: int,
    cost: Cost,
    seconds: float,
    generators: Mapping[str, torch.Generator],
    run: Mapping[str, Any],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole state at a step boundary. Changes nothing; tensors are live, so save or clone it before going on.

    Of several processes the first one gets it; the others help to make it.

    Args:
        objective: gives theta and warm starts.
        method: gives its own state (step sizes, accuracies, momenta).
        step: finished steps.
        cost: work so far.
        seconds: wall-clock time so far.
        generators: further generators on which the data order depends, by name.
        run: plain records of the trainer itself (summary, last validation).
        config: nested settings, for whoever wants to know; what is not plain in them is kept as text.
    """
    return {
        "step": step,
        "theta": dict(objective.theta),
        "method": {"class": type(method).__name__, "state": method.state_dict()},
        "objective": getattr(objective, "whole_state_dict", objective.state_dict)(),
        "cost": asdict(cost),
        "seconds": seconds,
        "rng": rng_state(),
        "generators": {name: generator.get_state() for name, generator in generators.items()},
        "run": dict(run),
        "config": _settings(config),
    }


def _settings(value: Any) -> Any:
    """Nested settings as :func:`to_plain` takes them."""
    if isinstance(value, Mapping):
        return {str(key): _settings(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_settings(item) for item in value)
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def restore_theta(theta: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: str) -> None:
    """Copy saved parameters into the existing tensors; nothing is copied if anything does not fit.

    Args:
        theta: live tensors by name.
        saved: tensors by name.
        source: file named in messages.

    Raises:
        CheckpointError: names, shapes or dtypes differ; all differences are named.
    """
    problems = [f"{name} is missing in the file" for name in theta if name not in saved]
    problems += [f"{name} is unknown to the energy" for name in saved if name not in theta]
    for name, tensor in theta.items():
        if name in saved and (saved[name].shape, saved[name].dtype) != (tensor.shape, tensor.dtype):
            problems.append(
                f"{name} is {tuple(saved[name].shape)} {saved[name].dtype} in the file, "
                f"{tuple(tensor.shape)} {tensor.dtype} in the energy"
            )
    if problems:
        raise CheckpointError(f"The parameters in {source} do not fit: {'; '.join(problems)}.")
    with torch.no_grad():
        for name, tensor in theta.items():
            tensor.copy_(saved[name])


def restore_state(
    state: Mapping[str, Any],
    objective: TrainableObjective,
    method: UpperLevelMethod,
    generators: Mapping[str, torch.Generator],
    source: str,
) -> None:
    """Put back what ``full_state`` returned, random numbers last.

    Args:
        state: the plain dict.
        objective: receives theta (in place) and warm starts.
        method: must be of the class that was saved.
        generators: as in ``full_state``.
        source: file named in messages.

    Raises:
        CheckpointError: something is missing or does not fit this objective, method or set of generators.
    """
    missing = [key for key in STATE_KEYS if key not in state]
    if missing:
        raise CheckpointError(f"{source} is incomplete: {', '.join(missing)} missing. Remove it to use an older one.")
    saved_class = state["method"]["class"]
    if saved_class != type(method).__name__:
        raise CheckpointError(
            f"{source} was written by the method {saved_class}. Got {type(method).__name__}. Use the configuration of "
            "the run that is resumed."
        )
    if set(generators) != set(state["generators"]):
        raise CheckpointError(
            f"{source} holds the generators {sorted(state['generators'])}. Got {sorted(generators)}. They must agree."
        )
    restore_theta(objective.theta, state["theta"], source)
    for name, part, saved in (
        ("objective", objective, state["objective"]),
        ("method", method, state["method"]["state"]),
    ):
        try:
            part.load_state_dict(saved)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"The state of the {name} in {source} does not fit: {error}") from error
    for name, generator in generators.items():
        generator.set_state(state["generators"][name].cpu())
    set_rng_state(state["rng"])


@contextmanager
def preserved(objective: TrainableObjective, generators: Mapping[str, torch.Generator]) -> Iterator[None]:
    """Undo whatever the body does to random numbers, theta and warm starts: looking must not change the run."""
    rng = rng_state()
    orders = {name: generator.get_state() for name, generator in generators.items()}
    theta = {name: tensor.detach().clone() for name, tensor in objective.theta.items()}
    warm = clone(to_plain(objective.state_dict()))
    theta_digest, warm_digest = digest(theta), digest(warm)
    try:
        yield
    finally:
        if digest(dict(objective.theta)) != theta_digest:
            restore_theta(objective.theta, theta, "memory")
        if digest(to_plain(objective.state_dict())) != warm_digest:
            objective.load_state_dict(warm)
        for name, generator in generators.items():
            generator.set_state(orders[name])
        set_rng_state(rng)
