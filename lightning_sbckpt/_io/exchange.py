"""Two names that swap what they stand for, in one step.

Linux has it (`renameat2` with `RENAME_EXCHANGE`), and most of its local filesystems can do it; Python
doesn't offer it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from pathlib import Path

# From the kernel's include/uapi/linux/fcntl.h and fs.h.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

# No such call, no such flag on this filesystem, or not across the layers of an overlay.
_CAN_NOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV)


def exchange(one: Path, other: Path) -> bool:
    """Let two files or folders, both of which exist, swap their names.

    Returns:
        Whether it was done. If not, the system can't, and nothing has changed.

    Raises:
        OSError: The disk refused; nothing has changed.
    """
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CAN_NOT:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@cache
def _renameat2() -> ctypes._NamedFuncPointer | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = (
        *(ctypes.c_int, ctypes.c_char_p) * 2,
        ctypes.c_uint,
    )
    return function
