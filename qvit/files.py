"""Writing files so that a crash, a full disk or Ctrl-C never leaves half of one."""

from __future__ import annotations

import errno
import os
import tempfile
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
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; the result gets the permissions of any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
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
