"""What waiting is worth: moving IoU of the demo's student for several look-aheads, as rows of results/lookahead.csv.

    python -m benchmarks.lookahead [--seeds 3] [--output runs/demo] [--forms 0,3,7,causal] [--teacher mambamos]
    python -m benchmarks.lookahead --draw docs/lookahead.png

Each student learns on the streets of `make demo`, from labels alone or also from the logits of a teacher that
`kdmos demo --teacher` left in `output`, and differs in look-ahead or form only. All are scored on those frames of the
held-out street for which every form has all its scans, and on the whole street. What `output` holds already is not
trained again. --draw makes the picture from the newest rows of students without a teacher.
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

FORMS = {str(lookahead): MotionSettings(lookahead=lookahead) for lookahead in (0, 3, 7)}
FORMS["causal"] = MotionSettings("causal")
HZ = 10.0  # of the sensor
FIRST = max(motion.history for motion in FORMS.values())
LAST = STREETS.scans - 1 - max(motion.lookahead for motion in FORMS.values())


def train(output: Path, motion: MotionSettings, teacher: str, seed: int) -> Path:
    """The last checkpoint of a student with these motion channels."""
    name, distill = f"lookahead_{motion.form}_{motion.lookahead}_{teacher or 'alone'}_{seed}", ["distill=null"]
    if teacher:
        distill = [f"distill.logits={output / 'logits'}", f"distill.teacher={teacher}"]
    elif motion == MotionSettings():
        name = f"alone_{seed}"  # the one that the demo trains
    places = [f"data.root={output / 'data'}", f"output={output / name}", f"data.cache={output / 'motion'}"]
    settings = [f"student.motion.form={motion.form}", f"student.motion.lookahead={motion.lookahead}", f"seed={seed}"]
    return train_once(load_config("demo", [*places, *settings, *distill]))


def draw(path: Path) -> None:
    """Moving IoU against delay: each seed a dot, the means joined; the causal form a little aside, to be seen."""
    from matplotlib.figure import Figure

    from kdmos.picture import HIT, MOVING, PAGE, PANEL, RING, TEXT

    with open(rows.RESULTS / "lookahead.csv", newline="") as file:
        found = list(csv.DictReader(file))
    found = [row for row in found if row["frames"] != "all" and not row["teacher"]]
    newest = {(row["form"], row["lookahead"], row["seed"]): row for row in found}
    found = list(newest.values())
    figure = Figure(figsize=(7, 4), facecolor=PAGE, dpi=130, layout="constrained")
    axes = figure.subplots()
    for form, colour, aside in (("published", MOVING, 0.0), ("causal", HIT, 0.02)):
        scores: dict[float, list[float]] = {}
        for row in found:
            if row["form"] == form:
                scores.setdefault(int(row["lookahead"]) / HZ + aside, []).append(100 * float(row["moving_iou"]))
        delays = sorted(scores)
        axes.plot(delays, [sum(scores[d]) / len(scores[d]) for d in delays], "-_", color=colour, ms=18, label=form)
        axes.plot(*zip(*((d, score) for d in delays for score in scores[d])), "o", color=colour, ms=5, alpha=0.7)
    axes.set(xlabel="delay, s at 10 Hz", ylabel="moving IoU, %", facecolor=PANEL, ylim=(50, 90))
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
    parser.add_argument("--forms", default=",".join(FORMS), help="look-aheads of the published form, or causal")
    parser.add_argument("--teacher", default="", help="distil from logits/NAME in the output folder")
    parser.add_argument("--draw", type=Path, help="only draw the rows that are there")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments.draw)
        return
    config = load_config("demo")
    synthesize(arguments.output / "data", STREETS)
    held_out = find_sequences(arguments.output / "data", config.data.valid)
    for seed in range(arguments.seeds):
        for motion in (FORMS[name] for name in arguments.forms.split(",")):
            student = load_student(train(arguments.output, motion, arguments.teacher, seed))
            for frames, bounds in ((f"{FIRST}-{LAST}", (FIRST, LAST)), ("all", ())):
                row = {
                    "data": "held-out street",
                    "frames": frames,
                    "form": motion.form,
                    "lookahead": motion.lookahead,
                    "teacher": arguments.teacher,
                    "seed": seed,
                    "epochs": config.epochs,
                    **moving_scores(student, held_out, "cpu", *bounds),
                }
                print(row)
                rows.append("lookahead", row)


if __name__ == "__main__":
    main()
