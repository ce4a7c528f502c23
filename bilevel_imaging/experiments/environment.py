"""What numbers were measured on."""

from __future__ import annotations

import platform
from typing import Any

import deepinv
import torch


def environment(device: str) -> dict[str, Any]:
    """Versions, threads and processor, for a record."""
    return {
        "torch": torch.__version__,
        "deepinv": deepinv.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processor": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
    }
