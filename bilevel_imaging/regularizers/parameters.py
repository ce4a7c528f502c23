"""The parameters of a regularizer: the order of its columns, and what is refused before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

# positive numbers and their reciprocals that can be multiplied with each other without leaving the range of a dtype
LARGEST = {torch.float64: 1e50, torch.float32: 1e18}
# parameters whose exponentials are divided by
DIVISORS = ("log_smoothing", "log_scale")


def ordered(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) in the order in which closed forms write their columns, whatever order they were set in.

    Raises:
        ValueError: if a parameter that they know is not there.
    """
    names = getattr(module, "known_parameters", None)
    if names is not None:
        for name in names:
            parameter, child = module._parameters.get(name), module._modules.get(name)
            if parameter is not None:
                yield prefix + name, parameter
            elif child is not None:
                yield from ordered(child, f"{prefix}{name}.")
            else:
                raise ValueError(
                    f"Expected {prefix}{name} as a plain nn.Parameter. Got a parametrized, pruned or deleted one, "
                    f"whose derivative the closed forms of {type(module).__name__} do not know."
                )
    elif isinstance(module, nn.ModuleList):
        for number, child in enumerate(module):
            yield from ordered(child, f"{prefix}{number}.")
    else:
        for name, parameter in module.named_parameters():
            yield prefix + name, parameter


def check_known(module: nn.Module, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Refuse a module with parameters that the columns of J are not written for.

    Args:
        module: with all its parameters.
        parameters: those that the columns are written for, by name.

    Raises:
        ValueError: naming a parameter that closed forms do not know, or that has two names.
    """
    first: dict[int, str] = {}
    for name, parameter in parameters:
        if first.setdefault(id(parameter), name) != name:
            raise ValueError(
                f"Expected parameters of their own. Got one nn.Parameter as {first[id(parameter)]} and {name}."
            )
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in first:
            raise ValueError(
                f"Expected learned parameters among {sorted(first.values())}. Got {name} too, in which closed forms "
                "have no derivative; freeze it, or subclass Regularizer, which differentiates fn by autograd."
            )


def check_values(name: str, parameter: Tensor, dtype: torch.dtype) -> None:
    """Refuse values that computations in ``dtype`` can't begin with.

    Raises:
        ValueError: NaN or inf, or a logarithm (a name with "log_") of a number out of the range of ``dtype``.
    """
    if parameter.numel() == 0:
        return
    stored = parameter.detach()
    low, high = (float(stored),) * 2 if stored.dim() == 0 else map(float, stored.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"Expected finite parameters. Got NaN or inf in {name}.")
    leaf = name.rsplit(".", 1)[-1]
    if not leaf.startswith("log_"):
        return
    largest = LARGEST[dtype]
    limit, lowest = math.log(largest), -math.log(largest) if leaf.startswith(DIVISORS) else -math.inf
    if low < lowest or high > limit:
        raise ValueError(
            f"Expected {name} from {lowest:.1f} to {limit:.1f}, the logarithm of at most {largest:.0e}, for images in "
            f"{str(dtype).removeprefix('torch.')}. Got {low if low < lowest else high:.6g}."
        )
