"""Whatever the user has, recognised by its content: SemanticKITTI's layout, folders of scan files, bags."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from kdmos.data.bags import BAGS, BagScans
from kdmos.data.files import KINDS, find_files
from kdmos.data.semantic_kitti import ROOTS, find_sequences
from kdmos.data.source import ScanSource
from kdmos.errors import InputError


def open_sources(
    path: str | Path,
    names: Iterable[str] | None = None,
    topic: str | None = None,
    remission_scale: float = 1.0,
) -> list[ScanSource]:
    """The sequences of scans at a path.

    Args:
        path: A data root or sequence folder in SemanticKITTI's layout; a folder of .bin, .npy, .pcd or .ply scans, or
            one of them, which stands for its folder; a ROS 1 bag, a ROS 2 bag or an MCAP file.
        names: Which sequences, of a data root; None: all.
        topic: Which topic, of a bag; None: its only one of PointCloud2.
        remission_scale: What brings the remission to 0..1.
    Raises: InputError if there is nothing to read, or an argument does not belong to what is there.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))
    kind = path.suffix.lower() if path.is_file() else None
    if kind in KINDS:
        warnings.warn(f"{path}: one scan tells nothing of motion; all of its folder are read", stacklevel=2)
        return open_sources(path.parent, names, topic, remission_scale)
    is_bag = kind in BAGS or _is_ros2_bag(path)
    if topic is not None and not is_bag:
        raise InputError(f"--topic {topic}: {path} is no bag")
    if is_bag:
        found = BagScans(path, topic)
    elif kind is not None:
        raise InputError(f"{path}: neither a bag ({', '.join(BAGS)}) nor a scan ({', '.join(KINDS)})")
    elif _is_semantic_kitti(path):
        return find_sequences(path.parent if path.name == "velodyne" else path, names, remission_scale)
    else:
        found = find_files(path, remission_scale)
    if found is None:
        bags = [file.name for file in sorted(path.iterdir()) if file.suffix.lower() in BAGS]
        raise InputError(
            f"{path}: holds {', '.join(bags[:5])}; name the bag itself"
            if bags
            else f"{path}: nothing to read here; expected scans ({', '.join(KINDS)}), a data root with "
            "sequences/NN/velodyne/, a sequence folder with velodyne/, or the metadata.yaml of a ROS 2 bag"
        )
    if names is not None:
        raise InputError(f"{path}: one sequence of scans, so there is none to choose by --sequences or --split")
    return [found]


def _is_ros2_bag(path: Path) -> bool:
    metadata = path / "metadata.yaml"
    return metadata.is_file() and b"rosbag2_bagfile_information" in metadata.read_bytes()


def _is_semantic_kitti(path: Path) -> bool:
    """Also of what is not there, so that the reader of that layout says so."""
    if not path.is_dir() or path.name == "velodyne":
        return True
    return any((path / name).is_dir() for name in ("velodyne", *ROOTS)) or any(path.glob("*/velodyne/"))
