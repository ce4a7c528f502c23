"""A device that isn't there: its tensors say that they are elsewhere, compute on the CPU, and refuse to be mixed.

Tensors made on the device ``meta`` inside :func:`other_device` hold numbers. What a GPU would refuse raises here, too:
operations between tensors of both devices (numbers without dimensions, and indices from the CPU, apart), and NumPy. So
the code for GPUs is tested, device by device, where there is none; that of compiled kernels for them is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("meta")
_aten = torch.ops.aten
# what moves numbers from one device to the other, or takes indices from the CPU
_MOVES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class Elsewhere(Tensor):
    """Wraps the tensor with the numbers, ``inner``."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        inner = inner.resolve_conj().resolve_neg()
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=ELSEWHERE,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:
        return _compute(func, args, kwargs or {})

    def tolist(self):
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert elsewhere tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert elsewhere tensor to numpy. Use Tensor.cpu() first.")


class _Mode(TorchDispatchMode):
    """Takes what is made on the device, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        return _compute(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """``torch.tensor`` makes tensors without numbers itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and device is not None:
            if torch.device(device).type == ELSEWHERE.type:
                return func(*args, **{**kwargs, "device": "cpu"}).to(ELSEWHERE)
        return func(*args, **kwargs)


def _compute(func, args: tuple, kwargs: dict) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    there = any(isinstance(t, Elsewhere) for t in tensors)
    if any(t.device == ELSEWHERE and not isinstance(t, Elsewhere) for t in tensors):
        raise RuntimeError(f"{func}: a tensor without numbers, perhaps of indices from a list")
    if there and func not in _MOVES:
        together = tensors[:1] if func in _INDEXED else tensors
        if not all(isinstance(t, Elsewhere) or t.dim() == 0 for t in together):
            raise RuntimeError(f"{func}: expected all tensors on the same device. Got {_devices(tensors)}.")
    device = kwargs.get("device")
    if device is not None:
        there, kwargs = torch.device(device) == ELSEWHERE, {**kwargs, "device": torch.device("cpu")}
    elif func in _MOVES:
        there = isinstance(tensors[0], Elsewhere)
    result = func(*tree_map(_numbers, args), **tree_map(_numbers, kwargs))
    changed = {id(_numbers(t)): t for t in tensors} if func._schema.is_mutable else {}

    def placed(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return changed.get(id(t), Elsewhere(t) if there else t)

    return tree_map(placed, result)


def _numbers(t: Any) -> Any:
    return t.inner if isinstance(t, Elsewhere) else t


def _devices(tensors: list[Tensor]) -> str:
    return ", ".join(f"{'elsewhere' if isinstance(t, Elsewhere) else 'cpu'} {tuple(t.shape)}" for t in tensors)


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Where tensors made on the device hold numbers."""
    with _Functions(), _Mode():
        yield ELSEWHERE
