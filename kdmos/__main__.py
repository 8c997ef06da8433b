"""`kdmos X ...` runs the command module `kdmos.X`; `kdmos` alone lists them."""

from __future__ import annotations

import sys
from importlib import import_module

from kdmos import __version__
from kdmos.command import fail

# One line here, not an import: listing the commands must not load what only one of them needs.
COMMANDS = {
    "train": "Train or distil a student on labelled sequences.",
    "synth": "Make labelled LiDAR sequences of made-up streets.",
    "teach": "Cache a teacher's logits for every scan, for training to learn from.",
    "predict": "Write one label per point for every scan of a folder, a bag or a data set.",
    "evaluate": "Score predictions: moving IoU, per class, by range; pictures, an HTML report.",
    "suite": "Score checkpoints on the synthetic benchmark, side by side.",
    "view": "Show scans, labels and predictions: in a viewer, as pictures, as a film.",
    "clean": "Write sequences, or one map, without their moving points.",
    "export": "Write a student as ONNX or as a torch.export program, checked on scans.",
    "demo": "From nothing to a distilled student and a report, in ten minutes.",
    "bench": "Compare the speed of this machine's build with plain torch, op by op and end to end.",
    "doctor": "Say what is installed, what is built, and what to do about the rest.",
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: kdmos COMMAND ...   (kdmos COMMAND --help says it all)\n")
        print("\n".join(f"  {name:<10} {line}" for name, line in COMMANDS.items()))
        return
    if argv[0] == "--version":
        print(f"kdmos {__version__}")
        return
    if argv[0] not in COMMANDS:
        fail(argv[0], f"no such command; there are {', '.join(COMMANDS)}")
    import_module(f"kdmos.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    main()
