"""The store of teacher logits: one safetensors file a scan, checked against the scan on reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from kdmos.checkpoint import write_atomic
from kdmos.data.batch import ScanId
from kdmos.data.semantic_kitti import POINT_BYTES
from kdmos.errors import InputError

FORMAT_VERSION = 1
REMEDY = "cache the teacher's logits again"


@dataclass(frozen=True)
class TeacherLogits:
    """Logits of one teacher for the unaugmented scans: root/teacher/sequence/frame.safetensors.

    root: folder of all teachers' logits.
    teacher: name of the teacher, one folder below.

    A file holds `logits`, float16 [n, C], one row a point in scan order, and a header of strings:
    `format_version`, `teacher`, `settings` (JSON), `scan`, `num_points`, `num_classes`, `scan_hash` and
    `checksum` (BLAKE2b of the scan file and of the logits, 16 bytes in hex).

    The checks cost 2.1 ms to hash a 2 MB scan and 1 ms for its logits (120 k points, 4 classes) on one core.
    Reading the scan file a second time is spared by `scan_bytes`: its bytes, or the unchanged points as read.
    """

    root: Path
    teacher: str

    def path(self, scan: ScanId) -> Path:
        return Path(self.root) / self.teacher / scan.sequence / f"{scan.frame:06d}.safetensors"

    def write(self, scan: ScanId, scan_path: str | Path, logits: np.ndarray, settings: dict) -> Path:
        """Store the logits of a scan: under its name lies the old file or the whole new one, never a part.

        Args:
            scan: Whose logits.
            scan_path: The scan's file, hashed into the header.
            logits: [n, C], one row for each point of the file, any float type.
            settings: What the teacher ran with, as JSON takes it.
        Returns: the path written.
        Raises: InputError if the logits are not those of the scan's points or not finite in float16, or the file
            cannot be written.
        """
        path = self.path(scan)
        content = _scan_bytes(scan_path)
        if logits.ndim != 2 or len(logits) * POINT_BYTES != len(content):
            raise InputError(
                f"{path}: expected logits [{len(content) // POINT_BYTES}, classes], one row for each point of "
                f"{scan_path}, got {list(logits.shape)}"
            )
        with np.errstate(over="ignore"):  # reported below
            logits = np.ascontiguousarray(logits, dtype=np.float16)
        if not np.isfinite(logits).all():
            raise InputError(
                f"{path}: teacher '{self.teacher}' gave logits that are not finite in float16; nothing was "
                "written: check its weights and precision"
            )
        header = {
            "format_version": str(FORMAT_VERSION),
            "teacher": self.teacher,
            "settings": json.dumps(settings, sort_keys=True),
            "scan": str(scan),
            "num_points": str(logits.shape[0]),
            "num_classes": str(logits.shape[1]),
            "scan_hash": _hash(content),
            "checksum": _hash(logits),
        }
        write_atomic(path, safetensors.numpy.save({"logits": logits}, metadata=header))
        return path

    def read(
        self,
        scan: ScanId,
        scan_path: str | Path,
        num_points: int,
        num_classes: int,
        scan_bytes: bytes | np.ndarray | None = None,
    ) -> np.ndarray:
        """Logits of a scan, float16 [num_points, num_classes].

        Args:
            scan: Whose logits.
            scan_path: The scan's file, which must be the one that the teacher saw.
            num_points: Points of the scan.
            num_classes: Classes of the student.
            scan_bytes: Content of that file, if at hand.
        Raises: InputError if the file is missing, cut short, damaged, or of another scan, length, class count
            or teacher.
        """
        header, logits = self._read(scan)
        path = self.path(scan)
        if header["num_points"] != num_points:
            raise InputError(f"{path}: logits of {header['num_points']} points, the scan has {num_points}; {REMEDY}")
        if header["num_classes"] != num_classes:
            raise InputError(
                f"{path}: the teacher has {header['num_classes']} classes, the student {num_classes}; choose a "
                "teacher of the student's classes"
            )
        self._check_scan(header, scan, scan_path, scan_bytes)
        return logits

    def verify(self, scan: ScanId, scan_path: str | Path) -> dict:
        """Header of a sound file of this very scan, numbers and settings decoded; InputError as in `read`."""
        header, _ = self._read(scan)
        content = _scan_bytes(scan_path)
        self._check_scan(header, scan, scan_path, content)
        if header["num_points"] * POINT_BYTES != len(content):
            raise InputError(f"{self.path(scan)}: {header['num_points']} rows, not one for each point; {REMEDY}")
        return header

    def headers(self) -> Iterator[tuple[Path, dict]]:
        """(path, header) of every file of this teacher, decoded as in `verify`.

        Their payload is not looked at. Files that have no readable header are left out; `teacher` may be another
        than ours if a folder was renamed.
        """
        for path in sorted((Path(self.root) / self.teacher).glob("*/*.safetensors")):
            try:
                with safe_open(path, framework="np") as file:
                    header = _decoded(file.metadata(), path)
            except (OSError, SafetensorError, InputError):
                continue
            yield path, header

    def _read(self, scan: ScanId) -> tuple[dict, np.ndarray]:
        """Decoded header and logits of a file that is whole and consistent in itself."""
        path = self.path(scan)
        try:
            with safe_open(path, framework="np") as file:
                header, logits = file.metadata(), file.get_tensor("logits")
        except FileNotFoundError:
            raise InputError(
                f"{path}: no logits of teacher '{self.teacher}' for scan {scan}; cache them first"
            ) from None
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cut short or no file of teacher logits ({error}); {REMEDY}") from None
        header = _decoded(header, path)
        if header["teacher"] != self.teacher:
            raise InputError(f"{path}: logits of teacher '{header['teacher']}', expected '{self.teacher}'; {REMEDY}")
        shape = (header["num_points"], header["num_classes"])
        if logits.dtype != np.float16 or logits.shape != shape:
            raise InputError(
                f"{path}: the header says float16 {list(shape)}, the logits are {logits.dtype} "
                f"{list(logits.shape)}; {REMEDY}"
            )
        if _hash(logits) != header["checksum"]:
            raise InputError(f"{path}: damaged: the logits do not match their checksum; {REMEDY}")
        return header, logits

    def _check_scan(self, header: dict, scan: ScanId, scan_path: str | Path, scan_bytes=None) -> None:
        if header["scan_hash"] != _hash(_scan_bytes(scan_path) if scan_bytes is None else scan_bytes):
            raise InputError(
                f"{self.path(scan)}: logits of another scan: {scan_path} is not the file that the teacher saw "
                f"(then named {header.get('scan')}); {REMEDY}"
            )


def _decoded(header: dict[str, str] | None, path: Path) -> dict:
    try:
        header = dict(header or {})
        for name in ("format_version", "num_points", "num_classes"):
            header[name] = int(header[name])
        header["settings"] = json.loads(header["settings"])
        version, _, _, _ = (header[k] for k in ("format_version", "teacher", "scan_hash", "checksum"))
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not a file of teacher logits (header: {error}); {REMEDY}") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format version {version}, expected {FORMAT_VERSION}; {REMEDY}")
    return header


def _hash(content: bytes | np.ndarray) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _scan_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the scan cannot be read: {error.strerror}; check the path") from None
