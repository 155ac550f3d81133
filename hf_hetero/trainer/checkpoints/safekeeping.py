"""This keeps a run's work: checksums, files on the disk before older ones go, one run a folder."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from hf_hetero.errors import ConfigError
from hf_hetero.progress import progress

try:
    import fcntl
except ImportError:  # no such locks: nobody is noticed
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_FILE = "_hetero_run.lock"
LOOK_S = 0.5
"""How often a run that waits for another to end looks whether it has."""
"""What begins so is not pushed to the hub."""
CANNOT_SETTLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
"""What file systems say that have no such operation; a full disk says another thing."""
BYTES_AT_ONCE = 1 << 24
END_BYTES = 1 << 20
"""At each end of a file: older checkpoints have checksums of these only."""


def settle(paths: Iterable[Path]) -> None:
    """Wait until files, or the entries of folders, are on the disk: what a power cut leaves must be whole.

    Raises:
        OSError: they cannot be written.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in CANNOT_SETTLE:
                raise
        finally:
            os.close(descriptor)


def seals_of(paths: Mapping[Path, bool], doing: str) -> list[list[int]]:
    """Return the seals of files: size and checksum. Several are read at once: a checksum holds up no other thread.

    Args:
        paths: files, and whether the checksums are of their ends only, as in older checkpoints.
        doing: for the progress bar.
    """
    with ThreadPoolExecutor(thread_name_prefix="checksum") as threads:
        seals = threads.map(lambda path: (_seal_of_ends if paths[path] else _seal)(path), paths)
        with progress(len(paths), doing, "files") as count:
            read: list[list[int]] = []
            for seal in seals:
                read.append(seal)
                count(1)
            return read


def _seal(path: Path) -> list[int]:
    """Return the size of a file, and the checksum of its content."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(BYTES_AT_ONCE):
            checksum = zlib.crc32(piece, checksum)
        return [file.tell(), checksum]


def _seal_of_ends(path: Path) -> list[int]:
    """Return the size of a file, and the checksums of its ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = zlib.crc32(file.read(END_BYTES))
        file.seek(max(0, size - END_BYTES))
        return [size, head, zlib.crc32(file.read(END_BYTES))]


class Claim:
    """A `Claim` tells others that this process trains into a folder. It goes with the process, however that ends."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def close(self) -> None:
        """Give the folder back."""
        # removed while it is locked: as soon as it is not, the name may be that of another claim
        with suppress(OSError):
            Path(self._file.name).unlink(missing_ok=True)
        self._file.close()


def claim(folder: Path, saves: bool, patience_s: float = 0.0) -> Claim | None:
    """Claim a folder for a run. None: where the folder is, nobody could tell; or another run has it, and does no harm.

    Args:
        folder: output of the run.
        saves: whether it writes checkpoints.
        patience_s: how long another run is given to end, such as the ranks that a launcher is about to replace.

    Raises:
        ConfigError: another run saves there, too; each would delete the other's checkpoints, or resume from them.
    """
    until = time.monotonic() + patience_s
    try:
        file, is_mine = _locked(folder / LOCK_FILE)
        while not is_mine and time.monotonic() < until:
            file.close()
            time.sleep(LOOK_S)
            file, is_mine = _locked(folder / LOCK_FILE)
    except OSError:  # the folder cannot be written, or has no locks
        return None
    if is_mine:
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "saves": saves}))
        file.flush()
        return Claim(file)
    with file:
        other = _read(file)
    text = f"Another run trains into {folder} (process {other.get('pid', '?')} on {other.get('host', '?')})."
    if saves and other.get("saves", True):
        raise ConfigError(
            f"{text} Each would take the other's checkpoints for its own, and delete them. Give this run another "
            "output_dir, or end that one."
        )
    logger.warning("%s Give each its own output_dir, or their files will mix.", text)
    return None


def _locked(path: Path) -> tuple[IO[str], bool]:
    """Open the file of a claim; return it, and whether it could be locked.

    Such a lock belongs to a process: it ends with it, and readers of data that were forked from it do not hold it.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no locks")
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return file, False
            file.close()
            raise
        with suppress(OSError):
            # the lock is of what was opened, and must be of the file that others will open by its name
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file, True
        file.close()  # it was given back, and removed, meanwhile


def _read(file: IO[str]) -> dict[str, Any]:
    """Read who has a claim; nothing where the file does not say."""
    file.seek(0)
    try:
        data = json.loads(file.read())
    except ValueError:  # it is being written
        return {}
    return data if isinstance(data, dict) else {}
