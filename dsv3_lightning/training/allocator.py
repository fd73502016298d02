"""On Linux CPUs: memory that a step frees is kept for the next one."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """Tells glibc not to hand large blocks back to the kernel; False where there is no glibc.

    A training step allocates and frees the same hundreds of megabytes every time. By default each large block is
    mapped anew, and its pages are faulted in and zeroed one by one, which costs more than many of the operations.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 2**26)])
