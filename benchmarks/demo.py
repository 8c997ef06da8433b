"""Moving IoU of what `kdmos demo` trains, with and without distillation, as rows of results/demo.csv.

python -m benchmarks.demo [--seeds 3] [--output runs/demo] [--real DRIVE] [--teacher mambamos] [--config FILE]

Each row is one method and seed on one data set. What `output` holds already is not trained again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kdmos.config import load_config
from kdmos.data.semantic_kitti import find_sequences
from kdmos.demo import RULE, SPEEDS, STREETS, TEACHERS, print_scores, recall_by_speed, run_demo

from . import rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--real", type=Path, help="a labelled real sequence, e.g. ../shared/realdata/kitti-raw-0005-a")
    parser.add_argument("--teacher", default="demo", choices=TEACHERS)
    parser.add_argument("--config", default="demo", help="of the students")
    arguments = parser.parse_args()
    held_out, on_real = run_demo(
        arguments.output, arguments.real, arguments.seeds, arguments.config, teacher=arguments.teacher
    )
    config = load_config(arguments.config)
    found = [
        recall_by_speed(sequence, arguments.output / "rule" / "held_out")
        for sequence in find_sequences(arguments.output / "data", config.data.valid)
    ]
    total = sum(total for _, total in found)
    slow = total[: SPEEDS.index(2)].sum() / total.sum()
    real = {} if on_real is None else on_real.scores
    for data, methods, share in (("held-out street", held_out.scores, round(float(slow), 3)), (None, real, "")):
        for method, runs in methods.items():
            for seed, run in enumerate(runs):
                score = run["total"]
                row = {
                    "data": data or arguments.real.name,
                    "streets_seed": STREETS.seed,
                    "method": method,
                    "teacher": arguments.teacher,
                    "seed": "" if method == RULE else seed,
                    "lookahead": run["made_with"]["lookahead"],
                    "epochs": config.epochs,
                    "scans": score["scans"],
                    "moving_points": score["moving_points"],
                    "slow_share": share,
                    "moving_iou": round(score["moving_iou"], 4),
                    "precision": round(score["moving_precision"], 4),
                    "recall": round(score["moving_recall"], 4),
                }
                path = rows.append("demo", row)
        if methods:
            print_scores(methods, data or arguments.real.name)
            print(f"appended to {path}")


if __name__ == "__main__":
    main()
