"""The recipe of the shipped students at a tenth of its budget, from several seeds: how far apart the students lie.

    python -m benchmarks.spread [--output runs/spread] [--seeds 3]

Coarse, then fine, as configs/synthetic.yaml says, on 7 drawn streets instead of 67. Seeds differ in the first weights,
the order of the scans and what augmentation draws; the streets are the same. Scores are those of the first eight
streets of the suite's validation twin: rows of results/spread.csv. What `output` holds is not made again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from kdmos.config import load_config
from kdmos.data.synthetic.suite import suite_parts
from kdmos.demo import train_once
from kdmos.inference import prepared
from kdmos.models import load_model
from kdmos.suite import Competitor, count_part, predict_part, summary
from kdmos.synth import SynthSettings, synthesize

from . import rows
from .suite import score_columns

STREETS = SynthSettings(None, seed=1, sequences=8, scans=60, drift=0.8, jitter=0.8, compensate=None)
TRAIN, VALID = [f"{number:02d}" for number in range(7)], ["07"]
TWIN = next(iter(suite_parts("streets", twin=True)))
SCORED = TWIN._replace(settings=replace(TWIN.settings, sequences=8))


def train(seed: int, output: Path) -> Path:
    """The last checkpoint of the fine student of a seed."""

    def stage(name: str, *changes: str) -> Path:
        places = [
            f"data.root={output / 'data'}",
            f"data.cache={output / 'motion'}",
            f"output={output / f'{name}{seed}'}",
        ]
        split = [f"data.train={TRAIN}", f"data.valid={VALID}", "data.workers=0"]
        return train_once(load_config("synthetic", [*places, *split, f"seed={seed}", *changes]))

    coarse = stage("coarse", "init=null", "student.grid.bins=[240, 180, 32]", "optimizer.lr=0.0015", "epochs=2")
    return stage("fine", f"init={coarse}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/spread"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    output, twin = arguments.output, arguments.output / "twin"
    synthesize(output / "data", STREETS)
    synthesize(SCORED.folder(twin), SCORED.settings)
    for seed in range(arguments.seeds):
        checkpoint = train(seed, output)
        model = Competitor(f"seed{seed}", str(checkpoint), prepared(load_model(checkpoint), "bfloat16"))
        scored = summary(count_part(SCORED, twin, predict_part(SCORED, twin, model, torch.device("cpu"))).values())
        rows.append("spread", {"seed": seed, **score_columns(scored)})


if __name__ == "__main__":
    main()
