"""Which local folders are mirrors, and of which URL: noted where the user keeps it, not in the folder.

A folder that came from somebody else can hold any file, so nothing in it may say which store is read,
written and pruned, or to which host credentials are sent. A folder becomes a mirror when the user names
a URL. That is noted in the user's cache by the folder's path, device and inode, together with a random
word that is in the folder, too: another folder in the same place, or a copy elsewhere, is an ordinary
folder. The word alone makes nothing a mirror.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path

from lightning_sbckpt._format.yaml import parse_yaml
from lightning_sbckpt._io.inside import PRIVATE_FILE, PRIVATE_FOLDER, OpenFolder
from lightning_sbckpt._io.open_regular import read_regular
from lightning_sbckpt._io.records import RECORDS_NAME
from lightning_sbckpt._remote.urls import is_url
from lightning_sbckpt.errors import MetaError

logger = logging.getLogger("lightning_sbckpt")

NOTE_NAME = "REMOTE.yaml"
_FOLDER_NAME = "mirrors"
_MOST_BYTES = 2**16

# The URLs that this process was told, also where the cache can't be written.
_told: dict[str, str] = {}


def cache_folder() -> Path:
    """Return the folder in which this package keeps what is the user's own and can be lost."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "lightning-sbckpt"


def mirrored_url(root: Path) -> str | None:
    """Return the URL that a local folder is the mirror of, or None if it is an ordinary folder."""
    try:
        name = _entry_name(root)
    except OSError:
        return None
    if name in _told:
        # Two processes may each have written a word; the URL is this process's own.
        return _told[name] if noted_url(root) == _told[name] else None
    try:
        with OpenFolder(cache_folder() / _FOLDER_NAME) as registry:
            if not _is_private(registry):
                return None
            entry = json.loads(_read(registry, name))
        url, word = entry["url"], entry["word"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return (
        url
        if isinstance(url, str) and is_url(url) and word and _noted(root) == (url, word)
        else None
    )


def register(root: Path, url: str) -> None:
    """Note that a folder, which is there, is the mirror of a URL that the user has named."""
    try:
        name = _entry_name(root)
        _told[name] = url
        word = _note(root, url)
        cache = cache_folder()
        cache.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        with (
            OpenFolder(cache, follow=True) as above,
            above.below(_FOLDER_NAME, make=True, mode=PRIVATE_FOLDER) as registry,
        ):
            if not _is_private(registry):
                logger.debug("%s is not private, so no mirror is noted there", registry.path)
                return
            entry = json.dumps({"url": url, "path": os.path.realpath(root), "word": word}).encode()
            with suppress(OSError):
                if _read(registry, name) == entry:
                    return
            put(registry, name, entry)
    except OSError as error:
        logger.debug("other processes need the URL of the mirror %s: %s", root, error)


def noted_url(root: Path) -> str | None:
    """Return the URL that stands in a folder: a hint to compare with, never one to follow."""
    return _noted(root)[0]


def put(folder: OpenFolder, name: str, data: bytes, *, flushed: bool = False) -> None:
    """Give a private file new content in one step, whoever else does the same at that instant."""
    beside = f".{name}.{uuid.uuid4().hex}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(folder.open(beside, flags, PRIVATE_FILE), "wb") as stream:
            stream.write(data)
            stream.flush()
            # A record that a power cut takes is written again at the next look.
            if flushed:
                os.fsync(stream.fileno())
        folder.rename(beside, name)
    except BaseException:
        folder.remove(beside)
        raise


def _note(root: Path, url: str) -> str | None:
    """Write into a folder what it is a mirror of, unless that is there, and return its word."""
    noted, word = _noted(root)
    if noted != url or word is None:
        text = (
            "# This folder holds copies of what is there; it may be removed. To use it, name the URL:\n"
            f"# this file alone makes nothing a copy.\nurl: {json.dumps(url)}\nword: {uuid.uuid4().hex}\n"
        )
        with (
            OpenFolder(root, follow=True) as folder,
            folder.below(RECORDS_NAME, make=True, mode=PRIVATE_FOLDER) as records,
        ):
            put(records, NOTE_NAME, text.encode(), flushed=True)
        # As it is now: another process may have done the same.
        noted, word = _noted(root)
    return word


def _noted(root: Path) -> tuple[str | None, str | None]:
    """Return the URL and the word in a folder."""
    path = root / RECORDS_NAME / NOTE_NAME
    try:
        fields = parse_yaml(read_regular(path, _MOST_BYTES), path)
    except (OSError, MetaError):
        return None, None
    url, word = fields.get("url"), fields.get("word")
    return (
        url if isinstance(url, str) and is_url(url) else None,
        word if isinstance(word, str) and word else None,
    )


def _entry_name(root: Path) -> str:
    found = root.stat()
    key = f"{os.path.realpath(root)}\0{found.st_dev}\0{found.st_ino}"
    return hashlib.sha256(os.fsencode(key)).hexdigest()[:40] + ".json"


def _read(registry: OpenFolder, name: str) -> bytes:
    descriptor = registry.open(name, os.O_RDONLY)
    try:
        return os.read(descriptor, _MOST_BYTES)
    finally:
        os.close(descriptor)


def _is_private(registry: OpenFolder) -> bool:
    """Return whether nobody but this user can have written to the folder."""
    found = os.fstat(registry.descriptor)
    return found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o022
