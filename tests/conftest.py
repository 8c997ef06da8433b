"""Where the tests find data they do not own: goldens of the authors' code, and real scans."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).parent
SHARED = Path(os.environ.get("KDMOS_SHARED", TESTS.parents[1] / "shared"))


def shared_file(relative: str) -> Path:
    """A file of the shared data, or skip; fail where CI says that it must be there."""
    path = SHARED / relative
    if not path.exists():
        message = f"{relative} is not under {SHARED} (set KDMOS_SHARED; the data's licence keeps it out of here)"
        if os.environ.get("KDMOS_REQUIRE_SHARED") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture(scope="session")
def golden():
    """golden("a1_residual.npz") -> path: from the slim set in tests/goldens, else from the shared data."""

    def find(name: str) -> Path:
        slim = TESTS / "goldens" / name
        return slim if slim.exists() else shared_file(f"goldens/{name}")

    return find


@pytest.fixture(scope="session")
def realdata():
    """realdata("kitti-raw-0005-a") -> path of a real sequence or file."""
    return lambda name: shared_file(f"realdata/{name}")


@pytest.fixture(scope="session")
def write_sequence(golden):
    """write_sequence(folder) -> folder: the goldens' synthetic sequence of 14 scans in SemanticKITTI's layout."""
    content = np.load(golden("a1_residual.npz"))
    ends = np.cumsum(content["n_points"])[:-1]
    scans, labels = np.split(content["scans"], ends), np.split(content["labels"], ends)

    def write(folder: Path, frames: int = 14) -> Path:
        for name, suffix, columns in (("velodyne", "bin", scans), ("labels", "label", labels)):
            (folder / name).mkdir(parents=True)
            for frame in range(frames):
                columns[frame].tofile(folder / name / f"{frame:06d}.{suffix}")
        (folder / "poses.txt").write_bytes(content["poses_txt"].tobytes())
        (folder / "calib.txt").write_bytes(content["calib_txt"].tobytes())
        return folder

    return write


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """No test touches the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def one_thread():
    """torch on one thread: of many small steps, each would wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
