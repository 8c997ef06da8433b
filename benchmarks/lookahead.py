"""What waiting is worth: moving IoU of the demo's student for several look-aheads, as rows of results/lookahead.csv.

    python -m benchmarks.lookahead [--seeds 3] [--output runs/demo] [--draw docs/lookahead.png]

Each student learns from labels alone, on the streets of `make demo`, and differs in look-ahead or form only. All are
scored on those frames of the held-out street for which every form has all its scans, and on the whole street. What
`output` holds already is not trained again. --draw makes the picture from the rows of the newest commit.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from kdmos.config import load_config
from kdmos.data.semantic_kitti import find_sequences
from kdmos.demo import STREETS, train_once
from kdmos.models import load_student
from kdmos.settings import MotionSettings
from kdmos.synth import synthesize

from . import rows
from .accuracy import moving_scores

FORMS = [
    MotionSettings(lookahead=0),
    MotionSettings(lookahead=3),
    MotionSettings(lookahead=7),
    MotionSettings("causal"),
]
HZ = 10.0  # of the sensor
FIRST = max(motion.history for motion in FORMS)
LAST = STREETS.scans - 1 - max(motion.lookahead for motion in FORMS)


def train(output: Path, motion: MotionSettings, seed: int) -> Path:
    """The last checkpoint of a student with these motion channels."""
    name = f"lookahead_{motion.form}_{motion.lookahead}_{seed}"
    return train_once(
        load_config(
            "demo",
            [
                *(f"data.root={output / 'data'}", f"data.cache={output / 'motion'}", f"output={output / name}"),
                *(f"student.motion.form={motion.form}", f"student.motion.lookahead={motion.lookahead}"),
                *(f"seed={seed}", "distill=null"),
            ],
        )
    )


def draw(path: Path) -> None:
    """Moving IoU against delay: each seed a dot, the means joined."""
    from matplotlib.figure import Figure

    from kdmos.picture import HIT, MOVING, PAGE, PANEL, RING, TEXT

    with open(rows.RESULTS / "lookahead.csv", newline="") as file:
        found = list(csv.DictReader(file))
    found = [row for row in found if row["commit"] == found[-1]["commit"] and row["frames"] != "all"]
    figure = Figure(figsize=(7, 4), facecolor=PAGE, dpi=130, layout="constrained")
    axes = figure.subplots()
    for form, colour in (("published", MOVING), ("causal", HIT)):
        scores: dict[float, list[float]] = {}
        for row in found:
            if row["form"] == form:
                scores.setdefault(int(row["lookahead"]) / HZ, []).append(100 * float(row["moving_iou"]))
        delays = sorted(scores)
        axes.plot(delays, [sum(scores[d]) / len(scores[d]) for d in delays], "-_", color=colour, ms=18, label=form)
        axes.plot(*zip(*((d, score) for d in delays for score in scores[d])), "o", color=colour, ms=5, alpha=0.7)
    axes.set(xlabel="delay, s at 10 Hz", ylabel="moving IoU, %", facecolor=PANEL, ylim=(0, 100))
    axes.grid(color=RING, linewidth=0.6)
    axes.spines[:].set_color(RING)
    axes.tick_params(colors=TEXT)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
    axes.legend(labelcolor=TEXT, facecolor=PANEL, edgecolor=RING, title=None)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--draw", type=Path, help="only draw the rows that are there")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments.draw)
        return
    config = load_config("demo")
    synthesize(arguments.output / "data", STREETS)
    held_out = find_sequences(arguments.output / "data", config.data.valid)
    for seed in range(arguments.seeds):
        for motion in FORMS:
            student = load_student(train(arguments.output, motion, seed))
            for frames, bounds in ((f"{FIRST}-{LAST}", (FIRST, LAST)), ("all", ())):
                row = {"data": "held-out street", "frames": frames, "form": motion.form, "lookahead": motion.lookahead}
                row |= {"seed": seed, "epochs": config.epochs, **moving_scores(student, held_out, "cpu", *bounds)}
                print(row)
                rows.append("lookahead", row)


if __name__ == "__main__":
    main()
