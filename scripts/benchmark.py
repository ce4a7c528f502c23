"""Benchmarks: our methods and what else there is, side by side in one run.

python scripts/benchmark.py hypergradient [--json PATH]   # time to a hypergradient of known error
python scripts/benchmark.py certainty [--json PATH]       # work of a certified one beside an oracle's
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from bilevel_imaging.experiments import certainty, hypergradient_benchmark
from bilevel_imaging.kernels import compile_kernels


def parse() -> argparse.Namespace:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    common.add_argument("--json", type=Path, help="also write the record here")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workloads = parser.add_subparsers(dest="workload", required=True, help="what to measure")
    timed = workloads.add_parser("hypergradient", parents=[common], help="time to a hypergradient of known error")
    timed.add_argument("--repeats", type=int, default=7, help="timed repeats (default: %(default)s)")
    timed.add_argument("--compile", action="store_true", help="use compiled kernels (compile time not counted)")
    for f in fields(hypergradient_benchmark.Workload):
        timed.add_argument(f"--{f.name}", type=type(f.default), default=f.default, help="(default: %(default)s)")
    workloads.add_parser("certainty", parents=[common], help="work of a certified hypergradient beside an oracle's")
    return parser.parse_args()


def hypergradient(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Record and table of the timings."""
    compile_kernels(arguments.compile)
    names = [f.name for f in fields(hypergradient_benchmark.Workload)]
    workload = hypergradient_benchmark.Workload(**{name: getattr(arguments, name) for name in names})
    record = hypergradient_benchmark.run(workload, repeats=arguments.repeats)
    return record, hypergradient_benchmark.table(record)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.workload == "hypergradient":
        record, table = hypergradient(arguments)
    else:
        record = certainty.run()
        table = certainty.table(record)
    print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
