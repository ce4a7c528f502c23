"""Experiments of the literature and of this package: figures, a record of all numbers, and a table.

python scripts/reproduce.py quadratic [--output DIR] [--json PATH]
"""

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

# An experiment is a module with run() -> record (JSON-able), table(record) -> str, and either
# figures(record) -> {name: Figure} or figure(record) -> Figure.
EXPERIMENTS = {
    "quadratic": "bilevel_imaging.experiments.quadratic",
    "equivalence": "bilevel_imaging.experiments.equivalence",
    "silent_gradients": "bilevel_imaging.experiments.silent_gradients",
    "float32_floor": "bilevel_imaging.experiments.float32_floor",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one experiment, print its table and the names of the files written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS, help="what to reproduce")
    parser.add_argument("--output", type=Path, help="folder for figures and record.json (runs/reproduce/EXPERIMENT)")
    parser.add_argument("--json", type=Path, help="also write the record here")
    parsed = parser.parse_args(arguments)
    folder = parsed.output or Path("runs", "reproduce", parsed.experiment)

    from bilevel_imaging.training.figures import save_figure  # not before a wrong name has been refused

    experiment = importlib.import_module(EXPERIMENTS[parsed.experiment])
    record = experiment.run()
    print(experiment.table(record))
    several = hasattr(experiment, "figures")
    figures = experiment.figures(record) if several else {"figure": experiment.figure(record)}
    written = [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]
    text = json.dumps(record, indent=2) + "\n"
    for path in filter(None, [folder / "record.json", parsed.json]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        written.append(path)
    print("\nwritten:", *written, sep="\n  ")


if __name__ == "__main__":
    main()
