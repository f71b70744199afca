"""Memory that the C library keeps though nothing uses it.

glibc touches ever more pages of what it holds as small and large blocks come and go: a process that works at a steady
pace seems to grow for hours. Pages that are free as a whole can be given back to the system; it costs a millisecond.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import lru_cache


def give_back() -> bool:
    """Give free pages back to the system. Returns whether there were any; never where the C library cannot do so."""
    trim = _trim()
    return trim is not None and trim(0) == 1


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:  # musl has none
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    found: Callable[[int], int] = trim
    return found
