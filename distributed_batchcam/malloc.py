"""The C library's memory, kept by the process.

By default glibc hands large blocks back to the system and fetches them anew, page by page. How often depends on what
ran just before; on the CPU it costs some processes up to a fifth of each training step, and others nothing.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 1024, 65536


def keep_freed_memory(keep: bool = True) -> bool:
    """Let the process keep what it frees, for its next tensors; with `keep` False, as glibc has it by default.

    Returns:
        Whether it could be arranged: it is glibc's alone, and nothing happens with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim, blocks = (-1, 0) if keep else (_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX)
    return bool(mallopt(_M_TRIM_THRESHOLD, trim) and mallopt(_M_MMAP_MAX, blocks))
