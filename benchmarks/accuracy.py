"""Moving IoU of a student, a teacher or the training-free rule on labelled sequences, as a row of results/accuracy.csv.

python -m benchmarks.accuracy DATA CHECKPOINT [--frames FIRST LAST]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from kdmos import metrics
from kdmos.data.labels import CLASSES, to_classes
from kdmos.data.semantic_kitti import Sequence, find_sequences
from kdmos.errors import InputError
from kdmos.models import Teacher, load_model
from kdmos.predict import choose_device, predict_sequence

from . import rows

NAMES = CLASSES[4]
STATIC, MOVING = NAMES.index("static"), NAMES.index("moving")


class Tally:
    """Counts what is moving and predicted to, scan by scan."""

    def __init__(self) -> None:
        self.table, self.scans = np.zeros((len(NAMES), len(NAMES)), np.int64), 0

    def add(self, sequence: Sequence, frame: int, moving: np.ndarray) -> None:
        """A scan of a labelled sequence; moving: bool [n], as predicted."""
        truth = to_classes(sequence.read_labels(frame, len(moving)), NAMES, sequence.labels_path(frame))
        self.table += metrics.confusion(truth, np.where(moving, MOVING, STATIC), len(NAMES))
        self.scans += 1

    def scores(self) -> dict:
        """Moving IoU, precision and recall; unlabeled points do not count."""
        scored = metrics.ignore_truth(self.table, 0)
        return {
            "scans": self.scans,
            "moving_points": int(scored[MOVING].sum()),
            "moving_iou": round(metrics.moving_iou(self.table, MOVING), 4),
            "precision": round(float(metrics.precision(scored)[MOVING]), 4),
            "recall": round(float(metrics.recall(scored)[MOVING]), 4),
        }


def moving_scores(model, sequences: list[Sequence], device="cpu", first: int = 0, last: int = 10**9) -> dict:
    """What a model gets right of the frames first..last of labelled sequences."""
    tally = Tally()
    for sequence in sequences:
        for frame, result in predict_sequence(model, sequence, device):
            if isinstance(result, InputError):
                raise result
            if first <= frame <= last:
                tally.add(sequence, frame, result.predicted == model.moving)
    return tally.scores()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoint", help="a student, a teacher, or 'rule'")
    parser.add_argument("--frames", type=int, nargs=2, help="score these frames only, both ends included")
    arguments = parser.parse_args()
    device = choose_device("auto")
    model = load_model(arguments.checkpoint, device)
    first, last = arguments.frames or (0, 10**9)
    scores = moving_scores(model, find_sequences(arguments.data), device, first, last)
    row = {
        "data": arguments.data.absolute().name,
        "frames": f"{first}-{last}" if arguments.frames else "all",
        "scans": scores.pop("scans"),
        "checkpoint": "/".join(Path(arguments.checkpoint).parts[-2:]),  # a run's folder says more than best.safetensors
        "form": f"{model.settings.num_scans} scans" if isinstance(model, Teacher) else model.settings.motion.form,
        "lookahead": model.settings.lookahead,
        **scores,
    }
    print(row)
    print(f"appended to {rows.append('accuracy', row, device.type)}")


if __name__ == "__main__":
    main()
