"""How close the kernels come to what the machine can do: bytes against copying, products with filters against the
convolution library."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bilevel_imaging.experiments.environment import environment
from bilevel_imaging.native import native_kernels
from bilevel_imaging.regularizers import FieldsOfExperts, TotalVariation

# numbers read and written per pixel by a kernel that touches everything once: x and the gradient; a direction, three
# coefficients and the product
GRADIENT_NUMBERS, PRODUCT_NUMBERS = 2, 5


@torch.no_grad()
def run(device: str = "cpu", *, size: int = 2048, repeats: int = 9) -> dict[str, Any]:
    """Bandwidth of copying and of total variation at size x size, float32, and the rates of products with 48 filters.

    Args:
        device: "cpu" or "cuda".
        size: pixels along each side for total variation; an eighth of it for filters.
        repeats: timed calls after one to warm up; their median counts.

    Returns:
        The record that is saved as JSON; seconds, bytes per second, operations per second.
    """
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.rand((1, 1, size, size), generator=generator).to(device) for _ in range(2))
    target = torch.empty_like(x)

    def median(call: Callable[[], Tensor]) -> float:
        call()
        return sorted(_seconds(call, device) for _ in range(repeats))[repeats // 2]

    regularizer = TotalVariation(0.1, 0.01).to(device)
    at = regularizer.linearize(x)
    pixels = x.numel() * x.element_size()
    copying = 2 * pixels / median(lambda: target.copy_(x))
    rates = {
        "total variation, gradient": GRADIENT_NUMBERS * pixels / median(lambda: regularizer.grad(x)),
        "total variation, Hessian product": PRODUCT_NUMBERS * pixels / median(lambda: at.hvp(v)),
    }
    record = {
        "environment": environment(device),
        "kernels": native_kernels() if device == "cpu" else "PyTorch",
        "size": size,
        "copy_bytes_per_second": copying,
        "bytes_per_second": rates,
        "share_of_copy": {name: rate / copying for name, rate in rates.items()},
    }
    return record | {"filters": _filters(x[..., : size // 8, : size // 8].contiguous(), median)}


def _filters(x: Tensor, median: Callable[[Callable[[], Tensor]], float]) -> dict[str, float]:
    """A Hessian product of Fields of Experts beside the convolution library's own two, in the faster of its layouts."""
    experts = FieldsOfExperts(48, 7).to(x.device)
    at = experts.linearize(x)
    kernels = experts.kernels().to(x)
    extended = functional.pad(x, (3, 3, 3, 3), mode="reflect")
    responses = functional.conv2d(extended, kernels)
    product = median(lambda: at.hvp(x))
    layouts = [kernels.to(memory_format=f) for f in (torch.contiguous_format, torch.channels_last)]
    both = min(median(partial(functional.conv2d, extended, k)) for k in layouts)
    both += min(median(partial(functional.conv_transpose2d, responses, k)) for k in layouts)
    operations = 4 * kernels.numel() * x.numel()
    return {
        "product_seconds": product,
        "convolutions_seconds": both,
        "share_of_convolutions": both / product,
        "operations_per_second": operations / product,
    }


def _seconds(call: Callable[[], Tensor], device: str) -> float:
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(record: dict[str, Any]) -> str:
    """The record in words."""
    lines = [
        f"kernels: {record['kernels']}, {record['environment']['threads']} threads, {record['size']}x{record['size']}",
        f"copying                           {record['copy_bytes_per_second'] / 1e9:6.1f} GB/s",
    ]
    for name, rate in record["bytes_per_second"].items():
        lines.append(f"{name:33s} {rate / 1e9:6.1f} GB/s, {record['share_of_copy'][name]:.0%} of copying")
    filters = record["filters"]
    lines.append(
        f"48 filters 7x7, Hessian product   {filters['operations_per_second'] / 1e9:6.1f} Gflop/s, "
        f"{filters['share_of_convolutions']:.2f} times the rate of the library's two convolutions"
    )
    return "\n".join(lines)
