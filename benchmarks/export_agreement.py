"""How far an exported file agrees with the student it was made of, as rows of results/export_agreement.csv.

python -m benchmarks.export_agreement [SEQUENCE] [--checkpoint synthetic] [--scans 16]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from kdmos.data.semantic_kitti import find_sequences
from kdmos.export import FORMATS, MadeUpScans, compare
from kdmos.models import load_student

from . import rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sequence", nargs="?", help="folder of a sequence with poses; default: a synthetic street")
    parser.add_argument("--checkpoint", default="synthetic")
    parser.add_argument("--scans", type=int, default=16)
    given = parser.parse_args()
    student = load_student(given.checkpoint)
    source = find_sequences(given.sequence)[0] if given.sequence else MadeUpScans(given.scans)
    for suffix, (write, read, _) in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"student{suffix}"
            file.write_bytes(write(student))
            found = compare(student, read(file, student), source, given.scans)
        scans = Path(given.sequence).resolve().name if given.sequence else source.name
        row = {"format": suffix, "checkpoint": given.checkpoint, "scans": scans, "count": found.scans}
        row |= {"points": found.points, "same_class": f"{found.same / found.points:.7f}"}
        row |= {"largest_difference": f"{found.difference:.3g}"}
        print(row, flush=True)
        rows.append("export_agreement", row)


if __name__ == "__main__":
    main()
