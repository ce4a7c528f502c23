"""Shared settings of the tests."""

import warnings

import pytest
import torch

with warnings.catch_warnings():
    # jsonargparse, deepinv and their dependencies warn at import in some versions; our own warnings are errors
    warnings.simplefilter("ignore")
    import deepinv  # noqa: F401


@pytest.fixture(autouse=True)
def _quiet_torch():
    """Small problems run several times slower on many threads; every test starts from the same random state."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, 2))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """For tensors so small that they are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
