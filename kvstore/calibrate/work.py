"""What a run has measured so far, on disk, so that a killed run goes on where it stopped.

Every result is a folder of arrays that appears whole, by a rename. Results follow from the run's identity alone and
are combined in a fixed order, so a run that was interrupted gives the same bytes as one that was not. Arrays come
back as memory maps: a calibration needs far less memory than all it has captured.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.calibrate.options import CalibrationFailed

Arrays = Mapping[str, npt.NDArray[Any]]

_IDENTITY = "identity.json"
_ANOTHER = "remove it, or pass another --work"


class WorkFolder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def arrays(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """The result `name`, computed and kept where it is not there yet. Read-only."""
        folder = self._path / name
        if not folder.is_dir():
            scratch = self._path / f".{name}"
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
            scratch.mkdir()
            for key, array in compute().items():
                np.save(scratch / f"{key}.npy", array)
            scratch.rename(folder)
        return {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}


@contextlib.contextmanager
def work_folder(path: Path, identity: Mapping[str, Any]) -> Iterator[WorkFolder]:
    """The run's folder, new or left by a run of the same `identity`; removed when the block ends without an error.

    Raises CalibrationFailed for a folder of another run, of anything else, or in use.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        _claim(path, dict(identity))
        lock = os.open(path / _IDENTITY, os.O_RDWR)
    except OSError as error:
        raise CalibrationFailed(
            f"{path}: the work folder cannot be used: {error.strerror}; pass another --work"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise CalibrationFailed(f"{path}: another calibration is at work here: wait, or pass another --work") from None
    try:
        yield WorkFolder(path)
        shutil.rmtree(path)
    finally:
        os.close(lock)


def _claim(path: Path, identity: dict[str, Any]) -> None:
    file = path / _IDENTITY
    if not file.exists():
        if any(entry.name != f".{_IDENTITY}" for entry in path.iterdir()):
            raise CalibrationFailed(f"{path} is not empty and no calibration's work folder: pass another --work")
        scratch = path / f".{_IDENTITY}"
        scratch.write_text(json.dumps(identity, indent=1, sort_keys=True) + "\n")
        scratch.rename(file)
        return
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CalibrationFailed(f"{file} is damaged: {_ANOTHER}")
    differing = sorted(key for key in {*found, *identity} if found.get(key) != identity.get(key))
    if differing:
        raise CalibrationFailed(f"{path} holds the work of another run (other {', '.join(differing)}): {_ANOTHER}")
