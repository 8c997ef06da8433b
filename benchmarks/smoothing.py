"""What fusing the moving probability over scans is worth, as rows of results/smoothing.csv.

python -m benchmarks.smoothing DATA CHECKPOINT [--horizons 0,3,5,10]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kdmos.data.semantic_kitti import find_sequences
from kdmos.models import load_model
from kdmos.stream import MosStream

from . import rows
from .accuracy import Tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("--sequences", help="names, e.g. 00,01")
    parser.add_argument("--horizons", default="0,3,5,10", help="scans that are fused; 0: not at all")
    given = parser.parse_args()
    model = load_model(given.checkpoint)
    sequences = find_sequences(given.data, given.sequences and given.sequences.split(","))
    for horizon in map(int, given.horizons.split(",")):
        stream, tally = MosStream(model, smoothing=horizon), Tally()
        for sequence in sequences:
            results = (stream.push(sequence.read_points(f), p) for f, p in zip(sequence.frames, sequence.poses()))
            for result in [*filter(None, results), *stream.flush()]:
                tally.add(sequence, sequence.frames[result.scan_id], result.labels == 251)
        row = {"data": given.data.resolve().name, "checkpoint": given.checkpoint, "horizon": horizon}
        row |= {"lookahead": stream.lookahead, **tally.scores()}
        print(row)
        rows.append("smoothing", row)


if __name__ == "__main__":
    main()
