"""The standard output when it can't be written: its reader has left, or the disk is full."""

import errno
import os
import select

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reader_has_left() -> bool:
    """Whether the reader of our output has closed it; if so, the remaining output is discarded."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    discard_output()
    return True


def output_is_full(error: OSError) -> bool:
    """Whether the standard output could not be written; if so, the remaining output is discarded.

    An error of any other file has its name.
    """
    if error.filename is not None or error.errno not in FULL:
        return False
    discard_output()
    return True


def discard_output() -> None:
    """Discards what the standard output's buffer still holds, which Python would try to write again when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
