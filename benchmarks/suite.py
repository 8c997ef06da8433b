"""Scores of `kdmos suite` as rows of results/suite.csv, one for each checkpoint and part.

kdmos suite runs/suite --checkpoint synthetic --checkpoint rule
python -m benchmarks.suite runs/suite
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import rows


def score_columns(scores: dict) -> dict:
    """Columns of a row: shares in 0..1, "" where there is none. scores: what `kdmos.suite.summary` gives."""
    mean, total = scores["mean"], scores["total"]
    values = {
        "moving_iou": mean["moving_iou"],
        "low": mean["low"],
        "high": mean["high"],
        "precision": total["moving_precision"],
        "recall": total["moving_recall"],
        "object_recall": total["object_recall"],
        "false_objects": total["false_objects_per_scan"],
        "false_points": total["false_points_per_scan"],
    }
    return {key: "" if value is None else round(value, 4) for key, value in values.items()}


def score_rows(result: dict, name: str) -> list[dict]:
    """Rows of one checkpoint's results: of each suite as a whole (part "all") and of its parts, if it has several.

    Args:
        result: What `kdmos.suite.run_suite` gives of a checkpoint.
        name: Of the checkpoint.
    """
    checkpoint = result["checkpoint"]
    about = {
        "suite_version": result["suite_version"],
        "synth_version": result["synth_version"],
        "twin": "yes" if result["twin"] else "no",
        "checkpoint": name,
        "fingerprint": (checkpoint["fingerprint"] or "")[:8],
        "lookahead": checkpoint["lookahead"],
        "computed_in": checkpoint["precision"],
    }
    found = []
    for suite, scored in result["suites"].items():
        parts = scored["parts"].items() if len(scored["parts"]) > 1 else ()
        for part, scores in (("all", scored), *parts):
            mean = scores["mean"]
            counts = {"sequences": mean["sequences"] + mean["left_out"], "scans": scores["total"]["scans"]}
            found.append({**about, "suite": suite, "part": part, **counts, **score_columns(scores)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder of kdmos suite")
    for path in sorted((parser.parse_args().output / "results").glob("*.json")):
        for row in score_rows(json.loads(path.read_text()), path.stem):
            print(*row.values(), sep="  ")
            rows.append("suite", row)


if __name__ == "__main__":
    main()
