"""The local mirror of a folder of checkpoints in a store: what every other part works on.

A save goes to the mirror first, as to any folder, and is uploaded then. A checkpoint of the store
has its small files here from the first look on, and large ones as soon as somebody reads them. What
is here and has no record (`_io/records.py`) is still to be uploaded.

Whoever changes the mirror by what the store says holds a lock, for two processes may look at once.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from stat import S_ISREG

from lightning_sbckpt._io.inside import PRIVATE_FOLDER, NotRegularError, OpenFolder, is_ours
from lightning_sbckpt._io.open_regular import read_regular
from lightning_sbckpt._io.progress import Told, announced
from lightning_sbckpt._io.records import (
    RECORDS_NAME,
    Stored,
    dump_record,
    identity,
    record_path,
    stored_files,
)
from lightning_sbckpt._io.storage import FileDigest, LocalStorage
from lightning_sbckpt._layout.annotations import ANNOTATIONS_NAME
from lightning_sbckpt._layout.history import HISTORY_NAME
from lightning_sbckpt._layout.manifest import MANIFEST_NAME
from lightning_sbckpt._layout.publish import (
    is_checkpoint,
    list_folders,
    publish,
    staging,
    unpublish,
)
from lightning_sbckpt._remote.folder import RemoteFile, RemoteFolder
from lightning_sbckpt._remote.registry import cache_folder, put, register
from lightning_sbckpt._remote.turns import interprocess_lock
from lightning_sbckpt.errors import CheckpointNotFoundError, RemoteError, SBCheckpointError
from lightning_sbckpt.meta import META_NAME

logger = logging.getLogger("lightning_sbckpt")

# Small files that are always here; nothing else is read without being asked for.
_SMALL_SUFFIX = ".yaml"
_MOST_SMALL = 16 * 2**20
_AT_ONCE = 8
# Another process may be reading thousands of small files.
_PATIENCE = 300.0
# What a filesystem says to a name that it does not take.
_NOT_POSSIBLE = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)

Files = Mapping[str, RemoteFile]


class Mirror:
    """A local folder that holds what there is in a store, as far as it is wanted here.

    Args:
        url: Of the folder of all checkpoints.
        root: The local folder; made when there is something to put there.
        remote: The store.
    """

    def __init__(self, url: str, root: Path, remote: RemoteFolder) -> None:
        self.url = url
        self.root = root
        self.remote = remote
        self._storage = LocalStorage()
        self._looks = threading.local()
        self._has_history = False

    # ------------------------------------------------------------------ looking

    def refresh(self) -> None:
        """Let the folder hold what the store holds now.

        Raises:
            RemoteError: The store can't be asked.
        """
        if getattr(self._looks, "done", False):
            return
        if not self.root.is_dir():
            if not self._listing():
                return
            self.make()
        with self._alone():
            # Before the store is asked: what comes into it meanwhile is not taken for gone.
            before = [folder for folder in list_folders(self.root) if stored_files(folder)]
            listing = self._listing()
            for folder in before:
                if folder.name not in listing:
                    self._drop(folder)
            new = [name for name, files in listing.items() if not self._agrees(name, files)]
            if new:
                self._take_over_all({name: listing[name] for name in new})
            self._take_history()
        if hasattr(self._looks, "done"):
            self._looks.done = True

    def open(self) -> None:
        """Make sure that the store can be used, and let the folder hold what it holds.

        Raises:
            RemoteError: It can't be reached, or refuses.
        """
        self.remote.check()
        self.make()
        self.refresh()

    def require(self, name: str) -> Path:
        """Return where a checkpoint is that another rank has seen, and make sure of it.

        Raises:
            RemoteError: The store can't be asked.
        """
        if not is_checkpoint(self.root / name):
            self.refresh()
        return self.root / name

    @contextmanager
    def one_look(self, *, known: bool = False) -> Iterator[None]:
        """Ask the store at most once inside the block, in this thread; not at all if it is known."""
        if hasattr(self._looks, "done"):
            yield
            return
        self._looks.done = known
        try:
            yield
        finally:
            del self._looks.done

    def make(self) -> None:
        """Make the folder, for this user alone, and note what it is a mirror of."""
        if not self.root.is_dir():
            is_cache = self.root.parent == cache_folder()
            self._storage.make_dirs(self.root.parent, PRIVATE_FOLDER if is_cache else 0o777)
            self._storage.make_dirs(self.root, PRIVATE_FOLDER)
        with OpenFolder(self.root, follow=True) as folder:
            folder.below(RECORDS_NAME, make=True, mode=PRIVATE_FOLDER).close()
        register(self.root, self.url)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with interprocess_lock(self.root / RECORDS_NAME / ".lock", _PATIENCE):
            yield

    def _agrees(self, name: str, files: Files) -> bool:
        """Return whether a checkpoint here is that of the store; make it so where that is cheap."""
        folder = self.root / name
        here = is_checkpoint(folder)
        stored = stored_files(folder) if here else {}
        if not here:
            return False
        if not stored:
            # Uploaded by a process that died before it could note it, or still to be uploaded.
            if self._is_same(name, files):
                self.note(folder, files)
            return True
        changed = {
            file
            for file in {*files, *stored}
            if file not in files
            or file not in stored
            or files[file].size != stored[file].size
            or files[file].tag != stored[file].tag
        }
        if changed - {ANNOTATIONS_NAME}:
            unknown = all(file in stored and not stored[file].tag for file in changed & {*files})
            if not (unknown and self._is_same(name, files)):
                return False
        if ANNOTATIONS_NAME in changed:
            self._take_annotations(folder, files)
        if changed:
            self.note(folder, files)
        return True

    def _is_same(self, name: str, files: Files) -> bool:
        """Return whether a checkpoint of the store was written by the same save as the one here."""
        proof = MANIFEST_NAME if MANIFEST_NAME in files else META_NAME
        try:
            here = read_regular(self.root / name / proof, _MOST_SMALL)
            return self.remote.read(name, proof) == here
        except FileNotFoundError:
            return False

    def _take_annotations(self, folder: Path, files: Files) -> None:
        path = folder / ANNOTATIONS_NAME
        if ANNOTATIONS_NAME not in files:
            self._storage.remove_file(path)
            return
        with suppress(FileNotFoundError):
            _put(path, self.remote.read(folder.name, ANNOTATIONS_NAME))

    def _take_history(self) -> None:
        if self._has_history:
            return
        path = self.root / HISTORY_NAME
        try:
            data = self.remote.read("", HISTORY_NAME)
            # Only grows; what is longer here is still to be uploaded.
            if len(data) > (path.stat().st_size if path.exists() else 0):
                _put(path, data)
        except FileNotFoundError:
            pass  # Nothing has happened yet.
        except (RemoteError, OSError) as error:
            logger.debug("going on without the history of %s: %s", self.url, error)
        self._has_history = True

    def _listing(self) -> Mapping[str, Files]:
        with announced(f"listing {self.url}"):
            found = self.remote.listing()
        return found if self._tells_case() else self._without_twins(found)

    def _tells_case(self) -> bool:
        """Return whether the disk takes two names that differ in case for two."""
        return not (self.root / RECORDS_NAME.upper()).exists()

    def _without_twins(self, found: Mapping[str, Files]) -> Mapping[str, Files]:
        seen: dict[str, str] = {}
        for name in sorted(found):
            twin = seen.setdefault(name.casefold(), name)
            if twin != name:
                self.remote.leave_out(name, f"{twin!r} has the same name here, but for its case")
        return {name: self._files_without_twins(name, found[name]) for name in seen.values()}

    def _files_without_twins(self, folder: str, files: Files) -> Files:
        seen: dict[str, str] = {}
        for name in sorted(files):
            twin = seen.setdefault(name.casefold(), name)
            if twin != name:
                why = f"{twin!r} has the same name here, but for its case"
                self.remote.leave_out(f"{folder}/{name}", why)
        return {name: files[name] for name in seen.values()}

    def _take_over_all(self, new: Mapping[str, Files]) -> None:
        small = [_small_sizes(files) for files in new.values()]
        size = sum(sum(sizes.values()) for sizes in small)
        with (
            announced(f"downloading what is new in {self.url}", size) as told,
            ThreadPoolExecutor(min(_AT_ONCE, len(new))) as pool,
        ):
            list(pool.map(lambda name: self._take_over_if_possible(name, new[name], told), new))

    def _take_over_if_possible(self, name: str, files: Files, told: Told) -> None:
        try:
            self._take_over(name, files, told)
        except SBCheckpointError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno in _NOT_POSSIBLE:
                # This disk has rules of its own for names.
                self.remote.leave_out(name, reason)
                return
            raise RemoteError(
                f"{self.url}/{name} can't be brought to {self.root}: {reason}. Make room there, or "
                "give local_dir a folder that can be written"
            ) from error

    def _take_over(self, name: str, files: Files, told: Told) -> None:
        folder = self.root / name
        with ExitStack() as stack:
            staged = stack.enter_context(staging(self.root, self._storage))
            try:
                for file in _small_sizes(files):
                    data = self.remote.read(name, file, most=_MOST_SMALL)
                    self._storage.write(staged / file, data)
                    told(len(data))
            except FileNotFoundError:
                # Removed since the store was listed.
                self._storage.remove_tree(staged)
                return
            if not folder.exists():
                # Before it is seen, so that nobody takes it for a checkpoint without large files.
                self._write_record(folder, identity(staged), files)
            replaced = publish(staged, folder, self._storage, replace=True)
        self.note(folder, files)
        if replaced is not None:
            self._storage.remove_tree(replaced)

    def _drop(self, folder: Path) -> None:
        with suppress(CheckpointNotFoundError, FileNotFoundError):
            self._storage.remove_tree(unpublish(folder, self._storage))
        forget_record(folder)

    # ------------------------------------------------------------------ records

    def note(self, folder: Path, files: Files) -> None:
        """Note what a checkpoint has in the store."""
        self._write_record(folder, identity(folder), files)
        # Who remembers the folder is to read it again.
        with suppress(OSError), OpenFolder(folder) as checkpoint:
            checkpoint.touch()

    def _write_record(self, folder: Path, of: list[int] | None, files: Files) -> None:
        stored = {name: Stored(file.size, file.tag) for name, file in files.items()}
        _put(record_path(folder), dump_record(of, stored))

    # ------------------------------------------------------------------ single files

    def fetch(self, folder: Path, names: Collection[str]) -> None:
        """Bring files of a checkpoint; one that the store lost, or behind a link, stays away."""
        stored = stored_files(folder)
        sizes = {name: stored[name].size for name in names if name in stored}
        what = "/".join([folder.name, *(names if len(names) == 1 else ())])
        with (
            announced(f"downloading {what}", sum(sizes.values())) as told,
            interprocess_lock(self.root / RECORDS_NAME / f"{folder.name}.lock", _PATIENCE * 12),
        ):
            for name in names:
                # What stands in its place is for whoever looks for damage to say.
                with suppress(FileNotFoundError, NotRegularError):
                    self._fetch_one(folder, name, sizes.get(name, 0), told)

    def _fetch_one(self, folder: Path, name: str, size: int, told: Told) -> None:
        inner, _, last = name.rpartition("/")
        with (
            OpenFolder(folder) as checkpoint,
            checkpoint.below(inner, make=True, mode=PRIVATE_FOLDER) as place,
        ):
            if place.has(last):
                told(size)  # Another process was faster.
            else:
                self.remote.fetch_into(place, last, folder.name, name, told)

    def digest(self, folder: Path, name: str, told: Told | None = None) -> FileDigest:
        """Return size and hash of a file in the store, which is read in full and not kept."""
        return self.remote.digest(folder.name, name, told)

    @contextmanager
    def removing(self, name: str) -> Iterator[None]:
        """Remove a checkpoint from the store; inside the block it is to be removed here.

        Raises:
            RemoteError: The store refuses, or can't be asked.
        """
        with self._alone():
            with suppress(CheckpointNotFoundError):  # It was never uploaded, or is gone already.
                self.remote.remove(name)
            yield
            forget_record(self.root / name)

    def annotate(self, folder: Path, change: Callable[[], object]) -> None:
        """Change what is said of a checkpoint here, and in the store; or in neither.

        Args:
            folder: The checkpoint. What is said of one still to be uploaded goes along with it.
            change: Changes it here.

        Raises:
            RemoteError: The store refuses, or can't be asked.
        """
        self.refresh()
        path = folder / ANNOTATIONS_NAME
        before = read_regular(path, _MOST_SMALL) if os.path.lexists(path) else None
        change()
        try:
            self.push_annotations(folder)
        except BaseException:
            if before is None:
                self._storage.remove_file(path)
            else:
                self._storage.replace(path, before)
            raise

    def push_annotations(self, folder: Path) -> None:
        """Upload what is said of a checkpoint, if the rest of it is there.

        Raises:
            RemoteError: The store refuses, or can't be asked.
        """
        stored = stored_files(folder)
        if not stored:
            return
        data = read_regular(folder / ANNOTATIONS_NAME, _MOST_SMALL)
        self.remote.write(folder.name, ANNOTATIONS_NAME, data)
        files = {name: RemoteFile(file.size, file.tag) for name, file in stored.items()}
        self.note(folder, {**files, ANNOTATIONS_NAME: RemoteFile(len(data), "")})


def local_files(folder: Path) -> dict[str, int]:
    """Return the sizes of the files of a checkpoint folder, by name; what is no file is none."""
    with OpenFolder(folder) as checkpoint:
        return {name: found.st_size for name, found in checkpoint.files() if S_ISREG(found.st_mode)}


def forget_record(folder: Path) -> None:
    """Remove what is noted of a checkpoint."""
    path = record_path(folder)
    with suppress(FileNotFoundError), OpenFolder(path.parent) as records:
        records.remove(path.name)


def _put(path: Path, data: bytes) -> None:
    with OpenFolder(path.parent, follow=not is_ours(path.parent)) as folder:
        put(folder, path.name, data)


def is_small(name: str, size: int) -> bool:
    """Return whether a file is one of those that are always here."""
    return "/" not in name and name.endswith(_SMALL_SUFFIX) and size <= _MOST_SMALL


def _small_sizes(files: Files) -> dict[str, int]:
    return {name: file.size for name, file in files.items() if is_small(name, file.size)}
