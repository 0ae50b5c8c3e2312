"""From what a user names, a path or a URL, to the local folder in which everything happens."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from lightning_sbckpt._io.records import RECORDS_NAME, fetch_by
from lightning_sbckpt._layout.publish import CKPT_PREFIX, folder_names
from lightning_sbckpt._remote.folder import RemoteFolder
from lightning_sbckpt._remote.mirror import Mirror
from lightning_sbckpt._remote.registry import cache_folder, mirrored_url, noted_url, register
from lightning_sbckpt._remote.urls import local_path, normal_url, without_secret
from lightning_sbckpt.errors import ConfigurationError

logger = logging.getLogger("lightning_sbckpt")

# What is needed to open a store is not written to the disk, so it is known to this process alone.
# For each URL the last that was used, and before it the last that the store has answered.
_remotes: dict[str, list[RemoteFolder]] = {}

# Folders of which it was said that they are no mirrors.
_said: set[Path] = set()


def place_of(
    path: str | os.PathLike[str],
    local_dir: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> tuple[Path, Mirror | None]:
    """Return the local folder of all checkpoints, and the mirror that it is, if it is one.

    Args:
        path: A path or a URL.
        local_dir: Where the mirror of a URL is to be.
        storage_options: For the store, see fsspec.

    Raises:
        ConfigurationError: The other arguments are for URLs, and this is none; or the folder for the
            mirror holds something else.
    """
    local = local_path(path)
    if local is not None:
        if local_dir is not None or storage_options is not None:
            name = "local_dir" if local_dir is not None else "storage_options"
            raise ConfigurationError(
                f"{name} is for the URL of a store, and {os.fspath(path)!r} is a folder on this "
                "machine: leave it out"
            )
        url = mirrored_url(local)
        if url is None:
            _say_what_it_says(local)
        return local, None if url is None else Mirror(url, local, _remote(url))
    url = normal_url(path)
    root = default_dir(url) if local_dir is None else Path(local_dir).expanduser()
    mirror = Mirror(url, root, _remote(url, storage_options))
    _refuse_other_use(root, url)
    if root.is_dir():
        register(root, url)
    return root, mirror


def resolve_local(path: str | os.PathLike[str]) -> Path:
    """Return the local folder of a run or of a checkpoint; of a URL after a look at the store.

    Raises:
        RemoteError: The store can't be asked.
    """
    local = local_path(path)
    if local is not None:
        return local
    above, _, last = normal_url(path).rpartition("/")
    if not last.startswith(CKPT_PREFIX):
        root, mirror = place_of(path)
        last = ""
    else:
        root, mirror = place_of(above)
    assert mirror is not None
    mirror.refresh()
    return root / last


def bring_file(url: str, target: Path, storage_options: Mapping[str, object] | None = None) -> None:
    """Bring a single file of a store here; `target` is there when it is whole.

    Raises:
        CheckpointNotFoundError: It isn't there.
        RemoteError: The store can't be asked.
    """
    folder, _, file = normal_url(url).rpartition("/")
    run, _, name = folder.rpartition("/")
    if storage_options is None and folder not in _remotes and run in _remotes:
        # A file of a checkpoint: how its run is opened is known.
        _remote(run).fetch(name, file, target)
    else:
        _remote(folder, storage_options).fetch("", file, target)


def mirror_at(root: Path) -> Mirror | None:
    """Return the mirror that a local folder is, or None if it is none."""
    url = mirrored_url(root)
    return None if url is None else Mirror(url, root, _remote(url))


def display_path(path: Path) -> str:
    """Return the URL of a folder or checkpoint in a mirror, or the path of any other."""
    for root, name in ((path, ""), (path.parent, f"/{path.name}")):
        url = mirrored_url(root)
        if url is not None:
            return url + name
    return str(path)


def default_dir(url: str) -> Path:
    """Return where the mirror of a URL is, unless the user says it."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in url.rpartition("/")[2])
    mark = hashlib.sha256(url.encode()).hexdigest()[:12]
    return cache_folder() / f"{name[:80]}-{mark}"


def _say_what_it_says(root: Path) -> None:
    """Say once that a folder that calls itself a mirror is used as an ordinary one."""
    url = noted_url(root) if os.path.lexists(root / RECORDS_NAME) else None
    if url is not None and root not in _said:
        _said.add(root)
        logger.warning(
            "%s calls itself a local copy of %.200r, which you have not named: it is used as an "
            "ordinary folder, and what it lacks is not fetched. If it is a copy of yours, name that "
            "URL, with local_dir=",
            root,
            without_secret(url),
        )


def _refuse_other_use(root: Path, url: str) -> None:
    there = mirrored_url(root)
    if there is not None and there != url:
        raise ConfigurationError(
            f"{root} can't hold the copies of {url}: it holds those of {there}. Give local_dir a "
            "folder of its own"
        )
    # One that an earlier release made, or another user, or that was moved, says so itself. The user
    # has named both, so nothing in the folder chooses.
    if there is None and folder_names(root) and noted_url(root) != url:
        raise ConfigurationError(
            f"{root} can't hold the copies of {url}: there are checkpoints in it already that are "
            "not from there. Give local_dir an empty folder, or one that is not there yet"
        )


def _remote(url: str, options: Mapping[str, object] | None = None) -> RemoteFolder:
    """Return the folder by these options, or by those with which the store has answered."""
    known = _remotes.get(url, [])
    fitting = [
        each
        for each in known
        if (each.answered or not each.options if options is None else each.options == options)
    ]
    found = fitting[-1] if fitting else RemoteFolder(url, storage_options=options)
    # Wrong options are forgotten as soon as others are used.
    answered = [each for each in known if each.answered and each is not found]
    _remotes[url] = [*answered[-1:], found]
    return found


def _fetch(folder: Path, names: Collection[str]) -> None:
    mirror = mirror_at(folder.parent)
    if mirror is not None:
        mirror.fetch(folder, names)


fetch_by(_fetch, lambda folder: mirrored_url(folder.parent) is not None)
