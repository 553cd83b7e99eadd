"""Files that commands write: whole or not at all, and one line where they cannot be."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from bench.errors import StoreError

__all__ = ["check_folder", "save", "write_text"]


def save(path: Path, content: bytes) -> None:
    """Write beside and rename, so that a reader never sees half a file; missing folders are made.

    Links and what is no file, such as /dev/stdout, are written to and not replaced.

    Raises:
        StoreError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_bytes(content)
            return
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".bench-", suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            temporary.chmod(0o644)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from None


def write_text(text: str, path: Path | None) -> None:
    """Write as UTF-8 to a file, or print where there is none.

    Raises:
        StoreError: the file cannot be written.
    """
    if path is None:
        sys.stdout.write(text)
    else:
        save(path, text.encode())


def check_folder(folder: Path, option: str) -> None:
    """Refuse, before long work, a folder that its files could not be written to; makes nothing.

    Args:
        folder: there or not.
        option: what named it, for the message.

    Raises:
        StoreError: it is a file, or it, or the nearest folder above it, cannot be written to.
    """
    existing = folder.expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise StoreError(f"{option}: cannot write {folder}: {error.strerror or error}") from None
