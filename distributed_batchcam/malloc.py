"""The C library's memory, kept by the process, and large tensors in huge pages.

By default glibc hands large blocks back to the system and fetches them anew, page by page. How often depends on what
ran just before; on the CPU it costs some processes up to a fifth of each training step, and others nothing. In pages
of 4 KiB the speed of a step also depends on where its tensors happen to lie.
"""

import ctypes
import os

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


def use_huge_pages() -> None:
    """Let torch ask the system for huge pages for tensors of 2 MiB and more, unless the user has set it otherwise.

    torch reads the setting at the first tensor of the process: afterwards this does nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
