"""Learnable weights W of the data term 1/2 ||W^(1/2) (Ax - y)||^2: a number, one per frequency, a sampling mask."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_imaging.checks import boolean
from bilevel_imaging.regularizers.base import positive_parameter


class DataWeight(nn.Module, abc.ABC):
    """W(p) > 0 for one tensor p of parameters, entry by entry; give it to ``VariationalEnergy(data_weight=...)``.

    Attributes:
        name: of the parameter.
        spectral: whether W acts on Fourier coefficients, or is one number for any operator.
    """

    name: str
    spectral = True

    @abc.abstractmethod
    def weights(self) -> Tensor:
        """W, of the shape of the parameter; differentiable, in its dtype."""

    @abc.abstractmethod
    def slopes(self) -> Tensor:
        """d log W / dp, likewise."""

    @property
    def parameter(self) -> Tensor:
        """p."""
        return getattr(self, self.name)

    @property
    def learned(self) -> bool:
        """Whether p is one of the parameters theta."""
        return self.parameter.requires_grad

    def arguments(self) -> dict[str, Any]:
        """What builds a weight of the same size; plain values."""
        return {"shape": list(self.parameter.shape)} if self.spectral else {}


class NoiseWeight(DataWeight):
    """W = e^w, one number: 1 / (variance of the noise), for any operator.

    Without a ridge only its ratio to the weight of the regularizer matters: learn one of them.

    Args:
        value: of W at the start.
        learn: whether ``log_weight`` is a parameter.

    Raises:
        ValueError: if the value is not a positive finite number.
    """

    name = "log_weight"
    spectral = False

    def __init__(self, value: float = 1.0, *, learn: bool = True):
        super().__init__()
        self.log_weight = positive_parameter(value, "value", boolean("learn", learn))

    def weights(self) -> Tensor:
        return self.log_weight.exp()

    def slopes(self) -> Tensor:
        return torch.ones_like(self.log_weight)


class FrequencyWeights(DataWeight):
    """W_f = e^(w_f) for every frequency f of the residual: the inverse of a noise spectrum.

    For MRI the grid is that of y, ``(H, W)``, and coils share the weights; for denoising and circular blurs that of
    ``torch.fft.rfft2``, ``(H, W // 2 + 1)``, and the Fourier transform is unitary. A dimension of length 1 is shared,
    so that ``(1, W)`` is one weight per column.

    Args:
        shape: of the parameter ``log_weights``.
        value: of all weights at the start.
        learn: whether ``log_weights`` is a parameter.

    Raises:
        ValueError: if the value is not a positive finite number, or the shape not two positive lengths.
    """

    name = "log_weights"

    def __init__(self, shape: Sequence[int], value: float = 1.0, *, learn: bool = True):
        super().__init__()
        start = positive_parameter(value, "value", False).detach()
        self.log_weights = nn.Parameter(start.expand(_grid(shape)).clone(), requires_grad=boolean("learn", learn))

    def weights(self) -> Tensor:
        return self.log_weights.exp()

    def slopes(self) -> Tensor:
        return torch.ones_like(self.log_weights)


class SamplingMask(DataWeight):
    """S in (0, 1) for every frequency of MRI, in 1/2 ||S (Ax - y)||^2: which part of k-space is worth measuring.

    W = S^2 and S = sigmoid(logits), for one coil or shared by several. Sherry et al. (2020), "Learning the sampling
    pattern for MRI"; there S is free in [0, 1].

    Args:
        shape: of the parameter ``logits``: that of y, ``(H, W)``, or ``(H, 1)`` or ``(1, W)`` for whole lines.
        start: S at the start.
        learn: whether ``logits`` is a parameter.

    Raises:
        ValueError: if start is not inside (0, 1), or the shape not two positive lengths.
    """

    name = "logits"

    def __init__(self, shape: Sequence[int], start: float = 0.9, *, learn: bool = True):
        super().__init__()
        if not 0 < start < 1:
            raise ValueError(f"Expected start inside (0, 1). Got {start!r}.")
        logits = torch.full(_grid(shape), start, dtype=torch.float64).logit()
        self.logits = nn.Parameter(logits, requires_grad=boolean("learn", learn))

    @property
    def mask(self) -> Tensor:
        """S, of the shape of ``logits``."""
        return self.logits.sigmoid()

    def weights(self) -> Tensor:
        return self.mask.square()

    def slopes(self) -> Tensor:
        return 2 * (-self.logits).sigmoid()


DATA_WEIGHTS: dict[str, type[DataWeight]] = {
    "noise": NoiseWeight,
    "frequencies": FrequencyWeights,
    "mask": SamplingMask,
}


def _grid(shape: Sequence[int]) -> tuple[int, ...]:
    lengths = tuple(int(n) for n in shape)
    if len(lengths) != 2 or min(lengths) < 1:
        raise ValueError(f"Expected shape as two positive lengths, rows and columns. Got {tuple(shape)}.")
    return lengths
