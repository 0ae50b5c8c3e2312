"""Who writes to a folder: the record in a lock file, and whether that process still lives."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import yaml

from lightning_sbckpt._format.yaml import parse_yaml
from lightning_sbckpt.errors import MetaError

_RECORD_BYTES = 4096
_ATTEMPTS = 20


def describe_me() -> dict[str, object]:
    """Return the record of this process."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        # The name only: arguments may hold what is secret.
        "program": Path(sys.argv[0] if sys.argv else "").name or "python",
        "process-start": _process_start(os.getpid()),
        "machine": _machine(),
    }


def _process_start(pid: int) -> int | None:
    """Return when a living process began, in ticks since the machine was started; None if it isn't.

    Field 22 of /proc/<pid>/stat, see proc_pid_stat(5): with it a pid that is used again is seen.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        # A zombie has ended; only its parent does not know yet.
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _lives(pid: int, start: object) -> bool:
    if _process_start(os.getpid()) is not None:
        return start is not None and _process_start(pid) == start
    try:  # A system without /proc: by the pid alone.
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return pid > 0


def _machine() -> str:
    """Return what pids belong to: this start of this machine, and the container."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def judge(
    owner: Mapping[str, object], me: Mapping[str, object]
) -> Literal["mine", "in use", "dead", "unknown"]:
    """Say what a record means for somebody who wants the folder."""
    if is_same_process(owner, me):
        return "mine"
    pid = owner.get("pid")
    here = owner.get("host") == me["host"] and owner.get("machine") == me["machine"]
    if not here or type(pid) is not int:
        return "unknown"
    return "in use" if _lives(pid, owner.get("process-start")) else "dead"


def is_same_process(owner: Mapping[str, object] | None, me: Mapping[str, object]) -> bool:
    """Return whether a record is that of the process `me`."""
    keys = ("pid", "host", "process-start", "machine")
    return owner is not None and all(owner.get(key) == me[key] for key in keys)


def write_record(descriptor: int, record: Mapping[str, object]) -> None:
    """Give a lock file this content, and nothing else."""
    data = yaml.safe_dump(dict(record), sort_keys=False).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)


def read_record(descriptor: int) -> dict[str, object]:
    """Return the record; an empty one if it can't be read."""
    for attempt in range(_ATTEMPTS):
        data = os.pread(descriptor, _RECORD_BYTES, 0)
        if data or attempt == _ATTEMPTS - 1:
            break
        time.sleep(0.01)  # The owner has just taken it and not yet written who it is.
    try:
        return parse_yaml(data, "the record of who writes")
    except MetaError:
        return {}


def read_record_at(path: Path) -> dict[str, object] | None:
    """Return the record of a file that nobody can lock, or None if there is no file."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return None
    try:
        return read_record(descriptor)
    finally:
        os.close(descriptor)


def spell(owner: Mapping[str, object]) -> str:
    """Return a record in words."""
    if "pid" not in owner or "host" not in owner:
        return "another process (it is not written who)"
    # In one line, whatever stands there.
    pid, program, host, since = (
        " ".join(str(owner.get(key, "unknown")).split())
        for key in ("pid", "program", "host", "since")
    )
    return f"process {pid} ({program}) on host {host}, which began to write there at {since}"
