"""Shared settings of the tests."""

import warnings

import pytest
import torch

with warnings.catch_warnings():
    # jsonargparse, deepinv and their dependencies warn at import in some versions; our own warnings are errors
    warnings.simplefilter("ignore")
    import deepinv  # noqa: F401


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small problems run several times slower on several threads, those of module fixtures included."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)
