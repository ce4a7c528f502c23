"""deepinv: ``GD`` with ``DEQ=True``, whose backward pass iterates on the adjoint fixed point equation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.experiments.peers.task import Task

NAME, PACKAGE = "deepinv", "deepinv"


def energy_prior(value: Callable[[Tensor, Tensor], Tensor], theta: Tensor) -> Any:
    """A deepinv prior with the energies ``value(x, theta)``, ``(B, 1, H, W)`` to ``(B,)``, and its own copy of theta as
    the parameter ``theta``."""
    from deepinv.optim import Prior

    class Energy(Prior):
        def __init__(self) -> None:
            super().__init__()
            self.explicit_prior = True
            self.theta = torch.nn.Parameter(theta.clone())

        def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return value(x, self.theta)

    return Energy()


def methods(task: Task) -> dict[str, Callable[[], list[float]]]:
    """Settings and what computes them; the defaults are 100 iterations forward and 50 backward."""
    from deepinv.optim import GD, L2, DEQConfig

    def implicit(**settings: Any) -> list[float]:
        prior = energy_prior(lambda x, theta: task.prior(torch, x[0, 0], theta)[None], task.theta)
        # trainable_params=None would try to make a parameter of g_param=None, too, and fail
        model = GD(data_fidelity=L2(), prior=prior, stepsize=1 / task.smoothness, trainable_params=[], **settings)
        y = task.y[None, None]
        x = model(y, task.physics, init=y)
        return torch.autograd.grad(task.loss(torch, x[0, 0]), prior.theta)[0].tolist()

    enough = {"max_iter": task.enough, "thres_conv": 1e-12, "DEQ": DEQConfig(max_iter_backward=task.enough)}
    return {
        "DEQ=True, otherwise all defaults": lambda: implicit(DEQ=True),
        "DEQ with jacobian_free=True": lambda: implicit(DEQ=DEQConfig(jacobian_free=True)),
        f"{task.enough} iterations forward and backward": lambda: implicit(**enough),
    }
