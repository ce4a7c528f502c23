"""What the C library does with freed memory, whether there are compiled kernels or not."""

import os
import subprocess
import sys

import pytest

from bilevel_imaging.native import memory


def test_kept_memory_comes_without_page_faults():
    """In a process of its own: this can't be undone."""
    program = (
        "import resource, runpy, numpy\n"
        f"keep_freed = runpy.run_path({memory.__file__!r})['keep_freed']\n"
        "def faults():\n"
        "    for _ in range(2):\n"
        "        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "        numpy.ones(40 * 2**20, dtype=numpy.uint8)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(faults(), keep_freed(), faults())"
    )
    environ = os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    before, told, after = done.stdout.split()
    if told == "False":
        pytest.skip("the C library can't be told")
    assert int(before) > 1000 > 100 > int(after)
