"""Reading every byte of a folder of checkpoints to see whether it is the one that was written."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import xxhash

from lightning_sbckpt._io.progress import Progress
from lightning_sbckpt._io.records import stored_files
from lightning_sbckpt._io.storage import FileDigest
from lightning_sbckpt._layout.annotations import ANNOTATIONS_NAME, read_annotations
from lightning_sbckpt._layout.manifest import (
    MANIFEST_NAME,
    Manifest,
    file_damage,
    find_damage,
    lost_manifest,
    read_manifest,
)
from lightning_sbckpt._layout.publish import CKPT_PREFIX
from lightning_sbckpt._remote.mirror import Mirror
from lightning_sbckpt._remote.places import mirror_at, resolve_local
from lightning_sbckpt._remote.urls import is_url
from lightning_sbckpt.errors import CheckpointNotFoundError, MetaError
from lightning_sbckpt.meta import META_NAME, read_meta

__all__ = ["Verification", "verify"]

_CHUNK = 8 * 2**20


@dataclass(frozen=True)
class Verification:
    """What was found in one checkpoint.

    Attributes:
        path: The folder.
        problems: What is wrong with it, a sentence each.
        annotation_problems: What is wrong with what was noted down about it later. It is no worse a
            checkpoint for that.
        remarks: What could not be verified.
        bytes: The size of its files.
        verified: Whether there is a manifest that says which bytes were written. SpeechBrain writes
            none.

    Example:
        >>> Verification(Path("CKPT+a"), ("model.ckpt is missing",)).status
        'damaged'
    """

    path: Path
    problems: tuple[str, ...] = ()
    annotation_problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    bytes: int = 0
    verified: bool = True

    @property
    def status(self) -> Literal["sound", "damaged", "unverified"]:
        """Whether it can be loaded, as far as anybody can tell.

        Example:
            >>> Verification(Path("CKPT+a"), verified=False).status
            'unverified'
        """
        if self.problems:
            return "damaged"
        return "sound" if self.verified else "unverified"


def verify(
    path: str | Path, *, workers: int = 2, on_progress: Progress | None = None
) -> list[Verification]:
    """Read every file of every checkpoint in a folder and compare it with what was written.

    Nothing is changed. Another process may save and prune meanwhile: a checkpoint that vanishes is
    left out, and one that is replaced is read again. In a store it is what is there that is read, and
    no file is kept here.

    Args:
        path: The folder of all checkpoints, or one checkpoint; or the URL of one of these.
        workers: How many files are read at once.
        on_progress: Called now and then with the bytes read so far and all bytes there are.

    Returns:
        What was found in each checkpoint, in the order of their names.

    Raises:
        CheckpointNotFoundError: There is no such folder.
        RemoteError: The store can't be reached, or refuses.

    Example:
        >>> import tempfile, torch
        >>> from lightning_sbckpt import Checkpointer
        >>> checkpointer = Checkpointer(tempfile.mkdtemp(), {"model": torch.nn.Linear(1, 1)})
        >>> saved = checkpointer.save_checkpoint(name="a")
        >>> [found.status for found in verify(checkpointer.checkpoints_dir)]
        ['sound']
        >>> with saved.paramfiles["model"].open("ab") as file:
        ...     _ = file.write(b"more")
        >>> verify(saved.path)[0].problems
        ('model.ckpt has ... bytes, ... were written',)
    """
    root = resolve_local(path)
    mirror = mirror_at(root) or mirror_at(root.parent)
    if mirror is not None and not is_url(path):
        mirror.refresh()
    if is_url(path) and not root.exists():
        return []
    if not root.is_dir():
        raise CheckpointNotFoundError(
            f"{root} can't be verified: it is no folder. Name the folder of all checkpoints, or one "
            "checkpoint in it"
        )
    tally = _Tally(on_progress)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        # Begun all at once, so that one large file does not keep the other workers idle.
        begun = [_begin(folder, pool, tally, mirror) for folder in _folders(root)]
        return [found for found in (_finish(check, pool, tally) for check in begun) if found]


def _folders(root: Path) -> list[Path]:
    """Return what is, or before it was damaged was, a checkpoint."""
    if _is_or_was_checkpoint(root):
        return [root]
    with os.scandir(root) as entries:
        candidates = sorted(
            Path(entry.path)
            for entry in entries
            if entry.name.startswith(CKPT_PREFIX) and entry.is_dir(follow_symlinks=False)
        )
    return [folder for folder in candidates if _is_or_was_checkpoint(folder)]


def _is_or_was_checkpoint(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (META_NAME, MANIFEST_NAME))


@dataclass
class _Check:
    """A checkpoint whose files are being read."""

    folder: Path
    identity: tuple[int, int] | None
    size: int = 0
    verified: bool = True
    problems: Callable[[], list[str]] = list
    remarks: list[str] = field(default_factory=list)
    mirror: Mirror | None = None


def _begin(folder: Path, pool: ThreadPoolExecutor, tally: _Tally, mirror: Mirror | None) -> _Check:
    check = _Check(folder, _identity(folder))
    stored = stored_files(folder) if mirror is not None else {}
    # One that is still to be uploaded is read here.
    check.mirror = mirror if stored else None
    sizes = {name: file.size for name, file in stored.items()} or dict(_sizes(folder))
    check.size = sum(sizes.values())
    try:
        manifest = read_manifest(folder)
    except (MetaError, OSError) as error:
        problem = f"{MANIFEST_NAME} can't be used: {error}"
        check.problems = lambda: [problem]
        return check
    if manifest is None:
        check.verified = lost_manifest(folder) is not None
        check.problems = pool.submit(_find_damage_unverified, folder).result
        if check.verified:
            return check
        check.remarks.append(f"it has no {MANIFEST_NAME}, so nobody can tell which bytes it had")
        return check
    described = {*manifest.files, MANIFEST_NAME, ANNOTATIONS_NAME}
    check.remarks += [
        f"{name} was added later: the manifest says nothing of it"
        for name in sorted(sizes.keys() - described)
    ]
    check.problems = _read_all(check, manifest, pool, tally)
    return check


def _read_all(
    check: _Check, manifest: Manifest, pool: ThreadPoolExecutor, tally: _Tally
) -> Callable[[], list[str]]:
    look: Callable[[Path, str, FileDigest], str | None]
    if check.mirror is not None:
        look = partial(_stored_damage, mirror=check.mirror, tally=tally)
    else:
        look = partial(file_damage, read=partial(_digest, tally=tally))
    tally.expect(sum(expected.size for expected in manifest.files.values()))
    jobs = [
        pool.submit(look, check.folder, name, expected) for name, expected in manifest.files.items()
    ]
    return lambda: [problem for job in jobs if (problem := job.result()) is not None]


def _stored_damage(
    folder: Path, name: str, expected: FileDigest, *, mirror: Mirror, tally: _Tally
) -> str | None:
    try:
        found = mirror.digest(folder, name, tally.add)
    except FileNotFoundError:
        return f"{name} is missing"
    if found.size != expected.size:
        return f"{name} has {found.size:,} bytes, {expected.size:,} were written"
    return (
        None
        if found == expected
        else f"{name} has other bytes than were written (checksum differs)"
    )


def _finish(check: _Check, pool: ThreadPoolExecutor, tally: _Tally) -> Verification | None:
    problems = check.problems()
    identity = _identity(check.folder)
    if identity is None:
        return None  # Removed since it was listed.
    if identity != check.identity:
        return _finish(_begin(check.folder, pool, tally, check.mirror), pool, tally)
    return Verification(
        check.folder,
        tuple(problems),
        tuple(_annotation_problems(check.folder)),
        tuple(check.remarks),
        check.size,
        check.verified,
    )


def _annotation_problems(folder: Path) -> list[str]:
    try:
        read_annotations(folder)
    except (MetaError, OSError) as error:
        return [f"{ANNOTATIONS_NAME} can't be used: {error}"]
    return []


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    for above, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                path = Path(above, name)
                yield path.relative_to(folder).as_posix(), path.lstat().st_size


def _find_damage_unverified(folder: Path) -> list[str]:
    problems = find_damage(folder)
    try:
        read_meta(folder / META_NAME)
    except (MetaError, OSError) as error:
        problems.append(f"{META_NAME} can't be read: {error}")
    return problems


class _Tally:
    """The bytes read so far, by all workers."""

    def __init__(self, tell: Progress | None) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._done = 0
        self._all = 0

    def expect(self, count: int) -> None:
        """Count bytes that will be read."""
        with self._lock:
            self._all += count

    def add(self, count: int) -> None:
        """Count bytes that have been read."""
        with self._lock:
            self._done += count
            if self._tell is not None:
                self._tell(self._done, max(self._all, self._done))


def _digest(stream: BinaryIO, *, tally: _Tally) -> FileDigest:
    """Return size and hash of an open file, telling how far it is."""
    hasher = xxhash.xxh3_128()
    size = 0
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    buffer = memoryview(bytearray(_CHUNK))
    # Unbuffered, and hashed in pieces that the hash takes without the interpreter's lock.
    while count := stream.readinto(buffer):  # type: ignore[attr-defined]
        hasher.update(buffer[:count])
        size += count
        tally.add(count)
    return FileDigest(size, hasher.hexdigest())
