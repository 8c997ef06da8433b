"""What each suspect is worth: a student trained on for a few steps, on streets with one thing changed.

    python -m benchmarks.suspects --init FILE [--before FOLDER] [--output runs/suspects] [--seeds 3] [--only raw poses]

The student of --init learns on for one epoch of 200 scans, coarse, and is then scored on the parked vehicles of the
suite's validation twin and, where KDMOS_SHARED has it, on kitti-raw-0005-b: rows of results/suspects.csv, one for each
variant, seed and data set. --before is a data set that an older generator made. What `output` holds is not made again.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kdmos.config import load_config
from kdmos.data.semantic_kitti import find_sequences
from kdmos.data.synthetic.lidar import SENSORS
from kdmos.data.synthetic.suite import LEAD, suite_parts
from kdmos.demo import train_once
from kdmos.errors import InputError
from kdmos.inference import prepared
from kdmos.models import load_model
from kdmos.predict import predict_sequence
from kdmos.suite import Competitor, count_part, predict_part, summary
from kdmos.synth import SynthSettings, synthesize

from . import rows
from .accuracy import Tally

SHARED = Path(os.environ.get("KDMOS_SHARED", Path(__file__).parents[2] / "shared"))
STREETS = SynthSettings(SENSORS["hdl64"], seed=31, sequences=11, scans=20, drift=0.3, scene="sparse")
TRAIN, VALID = [f"{number:02d}" for number in range(10)], ["10"]
PARTS = [part for part in suite_parts("scenes", twin=True) if part.name in ("parked", "parked_raw")]
VAN = 4  # instance of kitti-raw-0005-b's parked van


@dataclass(frozen=True)
class Variant:
    """streets: None: those of --before. whole: Whether to learn only from scans with a whole window. remission,
    false_motion: Share of the scans that get other remission or false motion. epochs: Of training. more: Other settings
    of the run."""

    streets: SynthSettings | None = STREETS
    whole: bool = False
    remission: float = 0.0
    false_motion: float = 0.0
    epochs: int = 1
    more: tuple[str, ...] = ()


LONG = replace(STREETS, scans=34)  # 20 of each 34 have seven scans before and seven after them
ALL = replace(LONG, sensor=None, compensate=None, drift=1.0, jitter=1.0, scene="street")
VARIANTS = {
    "before": Variant(None),
    "before, remission changed": Variant(None, remission=0.8),
    "sparse": Variant(),
    "whole windows": Variant(LONG, whole=True),
    "remission changed": Variant(remission=0.8),
    "false motion": Variant(false_motion=0.4),
    "nothing slow": Variant(replace(STREETS, scene="sparse_brisk")),
    "raw": Variant(replace(STREETS, compensate=False)),
    "poses": Variant(replace(STREETS, drift=1.0, jitter=1.0)),
    "parked": Variant(replace(STREETS, scene="sparse_parked")),
    "acts": Variant(replace(STREETS, scene="sparse_acts")),
    "clutter": Variant(replace(STREETS, scene="sparse_clutter")),
    "sensors": Variant(replace(STREETS, sensor=None)),
    "twice as long": Variant(epochs=2),
    "adamw": Variant(more=("optimizer.kind=adamw", "optimizer.lr=0.0005", "optimizer.weight_decay=0.01")),
    "sectors": Variant(epochs=3, more=("batch_size=3", "augment.sectors=3")),  # as many steps
    "all": Variant(ALL, whole=True, remission=0.8, false_motion=0.4),
}


def train(variant: Variant, name: str, seed: int, init: Path, data: Path, output: Path) -> Path:
    """The last checkpoint of a variant's student."""
    more = list(variant.more)
    if variant.whole:
        listed = data / "whole.txt"
        lead, scans = LEAD, variant.streets.scans
        listed.write_text("".join(f"{name} {frame:06d}\n" for name in TRAIN for frame in range(lead, scans - lead)))
        more.append(f"data.drop_static_scans={listed}")
    return train_once(
        load_config(
            "synthetic",
            [
                f"init={init}",
                f"seed={seed}",
                f"data.root={data}",
                f"data.train={TRAIN}",
                f"data.valid={VALID}",
                f"data.cache={output / 'motion'}",
                "data.workers=0",
                f"output={output / 'students' / f'{name} {seed}'}",
                "student.grid.bins=[240, 180, 32]",
                "batch_size=1",
                "augment.sectors=1",
                "optimizer.kind=sgd",
                "optimizer.weight_decay=0.0001",
                "optimizer.lr=0.005",
                "optimizer.warmup_epochs=0.1",
                "optimizer.decay=0.1",
                f"augment.remission={variant.remission}",
                f"augment.false_motion={variant.false_motion}",
                f"epochs={variant.epochs}",
                *more,
            ],
        )
    )


def on_twin(checkpoint: Path, name: str, output: Path) -> dict[str, dict]:
    """Scores of each part."""
    model = Competitor(name, str(checkpoint), prepared(load_model(checkpoint), "bfloat16"))
    found = {}
    for part in PARTS:
        synthesize(part.folder(output), part.settings)
        scored = summary(count_part(part, output, predict_part(part, output, model, torch.device("cpu"))).values())
        mean, total = scored["mean"], scored["total"]
        found[f"twin: {part.name}"] = {
            "moving_iou": mean["moving_iou"],
            "precision": total["moving_precision"],
            "recall": total["moving_recall"],
            "false_objects": total["false_objects_per_scan"],
            "van_moving": None,
        }
    return found


def on_van(checkpoint: Path | str) -> dict:
    """Scores on the real drive, and the share of the parked van's points that are called moving."""
    (sequence,) = find_sequences(SHARED / "realdata" / "kitti-raw-0005-b")
    tally, van = Tally(), np.zeros(2)
    model = prepared(load_model(checkpoint), "bfloat16")
    for frame, result in predict_sequence(model, sequence):
        if isinstance(result, InputError):
            raise result
        moving = result.predicted == model.moving
        tally.add(sequence, frame, moving)
        of_van = sequence.read_labels(frame, len(moving)) == (10 | VAN << 16)
        van += np.count_nonzero(of_van & moving), np.count_nonzero(of_van)
    scores = tally.scores()
    scores = {key: scores[key] for key in ("moving_iou", "precision", "recall")}
    return {**scores, "false_objects": None, "van_moving": van[0] / van[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, required=True, help="the student that learns on")
    parser.add_argument("--before", type=Path, help="a data set of an older generator, with 11 sequences at least")
    parser.add_argument("--output", type=Path, default=Path("runs/suspects"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    output = arguments.output
    real = (SHARED / "realdata" / "kitti-raw-0005-b").is_dir()
    for seed in range(arguments.seeds):
        for name in arguments.only:
            variant, done = VARIANTS[name], output / "done" / f"{name} {seed}"
            data = arguments.before if variant.streets is None else output / "data" / name
            if data is None or done.exists():
                continue
            if variant.streets is not None:
                same = next(n for n, other in VARIANTS.items() if other.streets == variant.streets)
                data = output / "data" / same
                synthesize(data, variant.streets)
            checkpoint = train(variant, name, seed, arguments.init, data, output)
            found = on_twin(checkpoint, f"{name} {seed}", output / "twin")
            if real:
                found["kitti-raw-0005-b"] = on_van(checkpoint)
            for where, scores in found.items():
                scores = {key: "" if value is None else round(value, 4) for key, value in scores.items()}
                rows.append("suspects", {"variant": name, "seed": seed, "data": where, **scores})
            done.parent.mkdir(parents=True, exist_ok=True)
            done.touch()


if __name__ == "__main__":
    main()
