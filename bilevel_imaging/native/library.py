"""The shared library of C kernels: compiled once per machine, kept in the user's cache folder, checked when loaded."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
SOURCES = (
    "kernels.c",
    "vectors.h",
    "convolutions.h",
    "stencils.h",
    "updates.h",
    "total_variation.h",
    "newton.h",
    "potentials.h",
    "filters.h",
    "sparse_features.h",
    "measure.h",
)
# sums may be reassociated and products contracted; NaN and inf keep their meaning
FLAGS = (
    "-O3",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fopenmp-simd",
)
PROCESSOR_FLAGS = ("-march=native", "-mprefer-vector-width=512")  # of x86
OTHER_PROCESSOR_FLAGS = ("-mcpu=native",)
SUFFIXES = {torch.float32: "float32", torch.float64: "float64"}
COMPILE_SECONDS = 120
OFF = "BILEVEL_NATIVE"


class NativeKernelWarning(RuntimeWarning):
    """A C compiler is there, but its kernels can't be used."""


def native_kernels() -> str:
    """Which CPU kernels are in use: "native", or why PyTorch's own operations are used instead.

    They are compiled at the first call in an environment (seconds). ``BILEVEL_NATIVE=0`` in the environment turns them
    off, ``CC`` names the compiler.
    """
    library, reason = _load()
    return "native" if library is not None else reason


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels can work on such tensors: on the CPU, float32 or float64, all alike, nothing recorded.

    A view with PyTorch's negative bit, such as the imaginary part of a conjugate, has other numbers in memory.
    """
    first = tensors[0]
    alike = all(t.dtype == first.dtype and t.device.type == "cpu" and not t.is_neg() for t in tensors)
    return alike and first.dtype in SUFFIXES and not torch.is_grad_enabled() and _load()[0] is not None


def function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """The kernel of that name for that type."""
    return _function(f"{name}_{SUFFIXES[dtype]}")


@functools.cache
def _function(symbol: str) -> Callable[..., None]:
    kernel = getattr(_load()[0], symbol)
    kernel.restype = None
    return kernel


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Address of the first number; NULL for ``None``."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def integers(*values: int) -> tuple[ctypes.c_int64, ...]:
    """Arguments of type int64_t."""
    return tuple(ctypes.c_int64(value) for value in values)


def reals(dtype: torch.dtype, *values: float) -> tuple[ctypes.c_float | ctypes.c_double, ...]:
    """Arguments of the C type that goes with ``dtype``."""
    real = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
    return tuple(real(value) for value in values)


def threads() -> ctypes.c_int:
    """The number of threads that PyTorch uses."""
    return ctypes.c_int(torch.get_num_threads())


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or ``None`` and the reason."""
    if os.environ.get(OFF, "1") == "0":
        return None, f"{OFF}=0"
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.name != "posix":
        return None, "no C compiler found"
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"The C kernels can't be built: {_last_line(error)}", NativeKernelWarning, stacklevel=2)
        return None, "the C kernels can't be built"
    if not _agrees(library):
        warnings.warn("The C kernels give wrong results with this compiler.", NativeKernelWarning, stacklevel=2)
        return None, "the C kernels give wrong results"
    return library, ""


def _last_line(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    return text.strip().splitlines()[-1] if text.strip() else type(error).__name__


def _built(compiler: str) -> Path:
    """Path of the library for these sources, this compiler and this processor; compiled if it is not there yet."""
    version = _run([compiler, "--version"]).stdout
    parts = [*((FOLDER / name).read_text() for name in SOURCES), " ".join(_flags()), version, _processor()]
    name = f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bilevel_imaging"
    if (folder / name).is_file():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        work = Path(tempfile.mkdtemp(dir=folder))
    except OSError:  # no home, or a full or read-only one: for this process only
        folder = work = Path(tempfile.mkdtemp())
    try:
        _compile(compiler, work / "new.so")
        os.replace(work / "new.so", folder / name)  # whole or not at all, whoever else is compiling
    finally:
        if work != folder:
            shutil.rmtree(work, ignore_errors=True)
    return folder / name


def _compile(compiler: str, target: Path) -> None:
    """With everything; else without OpenMP (one thread), else for any processor of this kind."""
    rest = [str(FOLDER / SOURCES[0]), "-o", str(target), "-lm"]
    for flags in ((*_flags(), "-fopenmp"), _flags()):
        if _run([compiler, *flags, *rest]).returncode == 0:
            return
    _run([compiler, *FLAGS, *rest]).check_returncode()


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)


def _flags() -> tuple[str, ...]:
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    return (*FLAGS, *(PROCESSOR_FLAGS if x86 else OTHER_PROCESSOR_FLAGS))


def _processor() -> str:
    """What "-march=native" depends on, as far as can be told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether a Laplacian with M = I, diagonal 2, comes out right on small images of two planes: with rows of whole
    vectors, and with others."""
    return all(_laplacian_agrees(library, dtype, width) for dtype in SUFFIXES for width in (21, 32))


def _laplacian_agrees(library: ctypes.CDLL, dtype: torch.dtype, width: int) -> bool:
    height = 3
    v = torch.arange(2.0 * height * width, dtype=dtype).square().remainder_(17).reshape(2, height, width)
    z, one, zero = torch.empty_like(v), torch.ones_like(v), torch.zeros_like(v)
    kernel = getattr(library, f"stencil_product_{SUFFIXES[dtype]}")
    kernel.restype = None
    fields = (pointer(one), pointer(zero), pointer(one), pointer(None), *reals(dtype, 2))
    sizes = integers(1, 2 * height, height, width)
    kernel(pointer(v), *fields, pointer(None), *integers(0, 0), pointer(z), *sizes, ctypes.c_int(1))
    expected = 2 * v
    for axis in (1, 2):
        n = v.shape[axis]
        step = v.narrow(axis, 1, n - 1) - v.narrow(axis, 0, n - 1)
        expected.narrow(axis, 0, n - 1).sub_(step)
        expected.narrow(axis, 1, n - 1).add_(step)
    return torch.equal(z, expected)  # small integers: exact
