"""Benchmarks: our methods and what else there is, side by side in one run.

python scripts/benchmark.py hypergradient [--workloads W1 W2 ...] [--peers all|none|NAMES] [--json PATH]
python scripts/benchmark.py training [--runs W6A ...]      # a whole training run to within 1 % of the best loss
python scripts/benchmark.py scaling [--json PATH]         # with pixels, images and processes
python scripts/benchmark.py kernels [--json PATH]         # against the bandwidth of copying and the convolution library
python scripts/benchmark.py reconstruction --regularizer FILE ...   # seconds to a certified reconstruction
python scripts/benchmark.py certainty [--json PATH]       # work of a certified one beside an oracle's

Other libraries: pip install -e ".[peers]"; those that are missing are skipped and named.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bilevel_imaging.cli import check_device, check_writable, one_line
from bilevel_imaging.experiments import benchmark, certainty, kernel_rates, reconstruction_time
from bilevel_imaging.experiments.benchmark import scaling, training
from bilevel_imaging.experiments.benchmark.peers.jaxopt import one_thread
from bilevel_imaging.export import load_regularizer


def parse() -> argparse.Namespace:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    common.add_argument("--json", type=Path, help="also write the record here")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True, help="what to measure")
    timed = kinds.add_parser("hypergradient", parents=[common], help="time to a hypergradient of known error")
    names, peers = list(benchmark.WORKLOADS), list(benchmark.ADAPTERS)
    about = "; ".join(f"{name}: {w.title}" for name, w in benchmark.WORKLOADS.items())
    timed.add_argument("--workloads", nargs="+", choices=names, default=["W1"], metavar="NAME", help=about)
    timed.add_argument("--peers", nargs="+", choices=["all", "none", *peers], default=["all"], metavar="NAME")
    timed.add_argument("--levels", nargs="+", type=float, default=list(benchmark.LEVELS), help="relative errors")
    timed.add_argument("--repeats", type=int, default=5, help="timed repeats (default: %(default)s)")
    timed.add_argument("--cap", type=float, default=10.0, help="CPU seconds of a call at most (default: %(default)s)")
    timed.add_argument("--images", type=int, help="only so many images of a workload, for a quick look")
    timed.add_argument("--compile", action="store_true", help="measure our compiled kernels, too")
    timed.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    whole = kinds.add_parser("training", parents=[common], help="time to within 1 %% of the best loss")
    about = "; ".join(f"{name}: {t.workload.title}" for name, t in training.TRAININGS.items())
    whole.add_argument(
        "--runs", nargs="+", choices=list(training.TRAININGS), default=["W6A"], metavar="NAME", help=about
    )
    whole.add_argument("--peers", nargs="+", choices=["all", "none", *training.ROUTES], default=["all"], metavar="NAME")
    whole.add_argument("--repeats", type=int, default=3, help="timed runs (default: %(default)s)")
    whole.add_argument("--figure", type=Path, help="also draw the curves here")
    growth = kinds.add_parser("scaling", parents=[common], help="cost by pixels, images and processes")
    growth.add_argument("--parts", nargs="+", choices=scaling.PARTS, default=list(scaling.PARTS), metavar="NAME")
    growth.add_argument("--repeats", type=int, default=5, help="timed repeats (default: %(default)s)")
    rates = kinds.add_parser("kernels", parents=[common], help="how close the kernels come to what the machine can do")
    rates.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    timed = kinds.add_parser("reconstruction", parents=[common], help="seconds to a certified reconstruction")
    timed.add_argument("--regularizer", nargs="+", type=Path, required=True, metavar="FILE", help="of train.py")
    timed.add_argument("--size", type=int, default=256, help="pixels along each side (default: %(default)s)")
    kinds.add_parser("certainty", parents=[common], help="work of a certified hypergradient beside an oracle's")
    return parser.parse_args()


def hypergradient(arguments: argparse.Namespace) -> dict[str, Any]:
    """Record of the timings."""
    if arguments.threads == 1:
        one_thread()
    return benchmark.run(
        arguments.workloads,
        chosen(arguments.peers, benchmark.ADAPTERS),
        levels=sorted(arguments.levels, reverse=True),
        images=arguments.images,
        repeats=arguments.repeats,
        cap=arguments.cap,
        compiled=arguments.compile,
        device=arguments.device,
        say=say,
        keep=lambda record: save(record, arguments.json),
    )


def whole_runs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Record of the training runs, and their figure."""
    if arguments.threads == 1:
        one_thread()
    record = training.run(
        arguments.runs,
        chosen(arguments.peers, training.ROUTES),
        repeats=arguments.repeats,
        say=say,
        keep=lambda record: save(record, arguments.json),
    )
    if arguments.figure:
        training.figure(record).savefig(arguments.figure, dpi=150)
    return record


def chosen(names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Those of ``known`` that are named, or all."""
    return [name for name in known if "all" in names or name in names]


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def save(record: dict[str, Any], path: Path | None) -> None:
    """Write the record where it was asked for."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")


def check(arguments: argparse.Namespace) -> None:
    """Notice now what would otherwise be noticed when everything is measured.

    Raises:
        ValueError: a number out of range, a device that is not there, a file that cannot be read or written.
        OSError: likewise.
    """
    for name, least in (("threads", 1), ("images", 1), ("repeats", 1), ("size", 8)):
        value = getattr(arguments, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name}: expected an integer >= {least}. Got {value}.")
    check_device("--device", getattr(arguments, "device", "cpu"))
    for name in ("json", "figure"):
        check_writable(f"--{name}", getattr(arguments, name, None))
    arguments.regularizers = {path.stem: load_regularizer(path) for path in getattr(arguments, "regularizer", ())}


def main() -> None:
    arguments = parse()
    try:
        check(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    torch.set_num_threads(arguments.threads)
    if arguments.kind == "hypergradient":
        record = hypergradient(arguments)
        table = benchmark.table(record)
    elif arguments.kind == "training":
        record = whole_runs(arguments)
        table = training.table(record)
    elif arguments.kind == "scaling":
        record = scaling.run(arguments.parts, repeats=arguments.repeats, say=say)
        table = scaling.table(record)
    elif arguments.kind == "kernels":
        record = kernel_rates.run(arguments.device)
        table = kernel_rates.table(record)
    elif arguments.kind == "reconstruction":
        record = reconstruction_time.run(arguments.regularizers, size=arguments.size)
        table = reconstruction_time.table(record)
    else:
        record = certainty.run()
        table = certainty.table(record)
    print(table)
    save(record, arguments.json)


if __name__ == "__main__":
    main()
