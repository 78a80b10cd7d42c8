"""Writing files so that a crash, a full disk or Ctrl-C never leaves half of one."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path

from qvit.errors import InputError


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes ``data`` beside ``path``, then renames: the old file or the new one is there at any moment, never a part.

    Raises:
        InputError: the folder does not exist, cannot be written, or the disk is full; an existing file is unharmed.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = _new_file_beside(path)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"The disk is full: {path} was not written; free some space and run the command again.") from None
        raise InputError(f"{path} cannot be written ({error.strerror or error}): choose another place.") from None
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def _new_file_beside(path: Path) -> tuple[int, Path]:
    """A file of a new name, open for writing: its descriptor and where it is.

    It has the permissions of any other new file. `tempfile` makes private ones, which would have to be given them afterwards,
    and the umask can only be asked for by changing it: for that instant it would be another one for all threads.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
        with suppress(FileExistsError):
            return os.open(temporary, flags, 0o666), temporary
