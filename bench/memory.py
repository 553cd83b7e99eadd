"""Memory of a process that makes and drops the same tensors at every step."""

from __future__ import annotations

import ctypes
import functools
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 32 << 20
"""Of the thresholds for mmap, the largest that glibc takes."""


@functools.cache
def keep_freed() -> bool:
    """Let the C library keep freed memory for the next tensor instead of giving it back to the system.

    By default glibc returns large blocks at once, and every step of an attack asks the system, page by page, for what
    it has just returned. Memory in use at its peak stays what it was. Without glibc nothing happens.

    Returns:
        Whether the C library agreed.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    agreed = [mallopt(_M_MMAP_THRESHOLD, _LARGEST), mallopt(_M_TRIM_THRESHOLD, 1 << 30)]
    return agreed == [1, 1]
