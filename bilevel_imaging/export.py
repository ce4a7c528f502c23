"""Learned regularizers as single files, and reconstructions with them."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepinv
import torch
from torch import Tensor

from bilevel_imaging.checks import instance, not_negative, number
from bilevel_imaging.energies import DATA_WEIGHTS, DataWeight
from bilevel_imaging.errors import CheckpointError
from bilevel_imaging.lower_solvers import LowerSolver
from bilevel_imaging.regularizers import REGULARIZERS, Regularizer
from bilevel_imaging.training.checkpoints import atomic_write
from bilevel_imaging.training.reconstruction import ReconstructionInfo, energy_of, minimize

__all__ = ["ReconstructionInfo", "load_regularizer", "reconstruct", "save_regularizer", "versions"]

FORMAT = 1
_KEY = "bilevel_imaging"
_WEIGHT_PREFIX = "data_weight."  # no regularizer has parameters of such a name


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import bilevel_imaging

    return {
        "bilevel_imaging": bilevel_imaging.__version__,
        "torch": torch.__version__,
        "deepinv": deepinv.__version__,
        "python": platform.python_version(),
    }


def save_regularizer(
    path: str | Path,
    regularizer: Regularizer,
    *,
    ridge: float = 0.0,
    noise_level: float | None = None,
    constants: Mapping[str, float] | None = None,
    data_weight: DataWeight | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a regularizer as safetensors with all that is needed to use it as JSON metadata; replaces in one piece.

    Args:
        path: the file; its folder is made if needed.
        regularizer: one of the classes in ``REGULARIZERS``.
        ridge: of the energy it was learned in.
        noise_level: standard deviation of the noise it was learned for.
        constants: of that energy, e.g. ``mu`` (strong convexity) and ``L`` (smoothness).
        data_weight: of that energy, one of the classes in ``DATA_WEIGHTS``.
        extra: further plain values, e.g. the problem.

    Raises:
        ValueError: no name of a file, or a class is not registered.
        OSError: cannot be written.
    """
    from safetensors.torch import save

    _check_path(path)
    numbers = {"noise_level": noise_level, **(constants or {})}
    for key, value in numbers.items():
        if value is not None and not math.isfinite(number(key, value)):
            raise ValueError(f"Expected {key} as a finite number. Got {value!r}.")
    name = type(regularizer).__name__
    if REGULARIZERS.get(_registered(name)) is not type(regularizer):
        raise ValueError(f"Expected a class of REGULARIZERS, so that it can be loaded. Got {name}; add it there.")
    if data_weight is not None and type(data_weight) not in DATA_WEIGHTS.values():
        raise ValueError(f"Expected a class of DATA_WEIGHTS. Got {type(data_weight).__name__}; add it there.")
    weight = None
    if data_weight is not None:
        weight = {"class": type(data_weight).__name__, "arguments": data_weight.arguments()}
    content = {
        "format": FORMAT,
        "class": name,
        "arguments": regularizer.arguments(),
        "ridge": not_negative("ridge", ridge),
        "noise_level": noise_level,
        "constants": dict(constants or {}),
        "data_weight": weight,
        "versions": versions(),
        **dict(extra or {}),
    }
    state = regularizer.state_dict()
    if data_weight is not None:
        state |= {_WEIGHT_PREFIX + key: t for key, t in data_weight.state_dict().items()}
    tensors = {key: t.detach().cpu().contiguous().clone() for key, t in state.items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save(tensors, metadata={_KEY: json.dumps(content, allow_nan=False)}))
    return path


def load_regularizer(path: str | Path, device: str | torch.device = "cpu") -> Regularizer:
    """Read what :func:`save_regularizer` wrote.

    Args:
        path: the file.
        device: where to.

    Returns:
        a deepinv ``Prior``, in evaluation mode; its attributes ``ridge``, ``noise_level``, ``data_weight`` (``None`` or
        a :class:`DataWeight`, not one of its submodules) and ``metadata`` (a dict) say what it was learned for. Its
        parameters are float64 and do not require gradients: call ``requires_grad_()`` to go on learning.

    Raises:
        CheckpointError: missing, damaged, or not written by this package; the message names the file.
        ValueError: no name of a file.
    """
    _check_path(path)
    path = Path(path).expanduser()
    content, tensors = _read(path)
    name = str(content.get("class"))
    kind = _registered(name)
    if kind is None:
        known = sorted(c.__name__ for c in REGULARIZERS.values())
        raise CheckpointError(f"{path} holds a {name}. This version knows {', '.join(known)}.")
    try:
        regularizer = REGULARIZERS[kind](**content["arguments"])
        regularizer.load_state_dict({k: t for k, t in tensors.items() if not k.startswith(_WEIGHT_PREFIX)})
        weight = _data_weight(content.get("data_weight"), tensors)
        regularizer.ridge, regularizer.noise_level = float(content["ridge"]), content["noise_level"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit the class {name}: {error}") from error
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise CheckpointError(f"{path} holds parameters that are NaN or infinite.")
    regularizer.metadata = content
    # nn.Module would make it one of the regularizer's modules, and its tensors parameters of the regularizer
    object.__setattr__(regularizer, "data_weight", None if weight is None else weight.to(device))
    return regularizer.requires_grad_(False).eval().to(device)


def _check_path(path: Any) -> None:
    instance("path", path, (str, os.PathLike), 'the name of a file, e.g. "runs/tv_denoise/regularizer.safetensors"')


def _data_weight(content: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> DataWeight | None:
    """The weight that was saved, frozen.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it does not fit.
    """
    if content is None:
        return None
    kinds = {kind.__name__: kind for kind in DATA_WEIGHTS.values()}
    weight = kinds[content["class"]](**content["arguments"])
    state = {k.removeprefix(_WEIGHT_PREFIX): t for k, t in tensors.items() if k.startswith(_WEIGHT_PREFIX)}
    weight.load_state_dict(state)
    return weight.requires_grad_(False)


def _registered(name: str) -> str | None:
    return next((kind for kind, c in REGULARIZERS.items() if c.__name__ == name), None)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. A finished run has one named regularizer.safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        content = json.loads(metadata[_KEY])
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({error}).") from error
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} was not written by bilevel_imaging: its metadata lack what is needed."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of format {FORMAT}. Use the version of bilevel_imaging that wrote it.")
    return content, tensors


def reconstruct(
    y: Tensor,
    physics: deepinv.physics.Physics,
    prior: Regularizer,
    error_tol: float | Tensor | None = None,
    ridge: float | None = None,
    *,
    x0: Tensor | None = None,
    solver: LowerSolver | None = None,
    noise_level: float | Tensor | None = None,
) -> tuple[Tensor, ReconstructionInfo]:
    """argmin_x 1/2 ||Ax - y||^2 + prior(x) + ridge/2 ||x||^2, with a certified distance to the minimizer.

    Where the prior was learned together with weights of the data term (``prior.data_weight``), the misfit is weighted.

    Args:
        y: measurements, ``(B, ...)``.
        physics: a linear deepinv physics.
        prior: any :class:`Regularizer`, e.g. from :func:`load_regularizer`.
        error_tol: distance ||x - x*|| asked for, float or ``(B,)``; ``None`` for a root mean square error of 1e-4 per
            pixel.
        ridge: ``None`` for that of the prior (what it was learned with), else 0.
        x0: start, ``(B, C, H, W)``.
        solver: ``None`` for Newton-CG.
        noise_level: standard deviation of the noise in y, float or ``(B,)``; for a prior that depends on it, such as
            :class:`NoiseConditional`, and only for that.

    Returns:
        x ``(B, C, H, W)`` and what is known of it, e.g. ``info.distance_bound`` per image.

    Raises:
        ValueError: measurements that do not fit, an energy that is not strongly convex (set ``ridge``), or a noise
            level that is missing or not used.
    """
    energy = energy_of(prior, y.device, ridge)
    if noise_level is not None:
        if not hasattr(prior, "at_noise_level"):
            raise ValueError(
                f"Expected no noise_level for {type(prior).__name__}, which does not depend on it. Got {noise_level}; "
                "use NoiseConditional, or leave it out."
            )
        energy.regularizer = prior.at_noise_level(noise_level)
    with torch.no_grad():
        return minimize(energy.bind(y, physics), x0, error_tol, solver)
