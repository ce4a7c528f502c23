"""Benchmarks: our methods and what else there is, side by side in one run.

python scripts/benchmark.py hypergradient [--json PATH]
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path

import torch

from bilevel_imaging.experiments import hypergradient_benchmark
from bilevel_imaging.kernels import compile_kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=["hypergradient"], help="what to measure")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="use compiled kernels (compile time not counted)")
    parser.add_argument("--json", type=Path, help="also write the record here")
    for f in fields(hypergradient_benchmark.Workload):
        parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compile_kernels(arguments.compile)
    names = [f.name for f in fields(hypergradient_benchmark.Workload)]
    workload = hypergradient_benchmark.Workload(**{name: getattr(arguments, name) for name in names})
    record = hypergradient_benchmark.run(workload, repeats=arguments.repeats)
    print(hypergradient_benchmark.table(record))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
