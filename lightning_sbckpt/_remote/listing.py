"""What a store says is there: files below a folder, with sizes, tags and times."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NoReturn

from lightning_sbckpt._remote.retries import Retries, clean, patiently, said
from lightning_sbckpt._remote.stores import Store
from lightning_sbckpt.errors import RemoteError

# Under these names the libraries of the stores give what changes with the content, best first.
_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "modified", "created", "LastModified")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
# Control characters, halves of a surrogate pair, and what is a separator elsewhere.
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\\\\]")
# Filesystems take 255 bytes. While files come and go, we put a few before and after their names.
_LONGEST_FILE = 245
_LONGEST_FOLDER = 205
_DEEPEST = 100


@dataclass(frozen=True)
class RemoteFile:
    """A file on a store.

    Attributes:
        size: In bytes.
        tag: Differs when the content does: a checksum, or a time where the store has none.
        modified: When it was put there, in seconds since 1970, or None where the store doesn't say.
    """

    size: int
    tag: str
    modified: float | None = None

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> RemoteFile:
        """Return what one of fsspec's descriptions says."""
        tag = next((info[key] for key in _TAGS if info.get(key)), "")
        seconds = _seconds(tag)
        modified = next((_seconds(info[key]) for key in _TIMES if info.get(key)), None)
        text = str(tag).strip('"') if seconds is None else f"{seconds:.6f}"
        return cls(int(info.get("size") or 0), text, modified)


def list_files(store: Store, retries: Retries, below: str = "") -> dict[str, RemoteFile]:
    """Return the files below the folder of a store, or below a folder in it, by relative name.

    A name that would lead out of the folder is left out. A folder that isn't there has no files.

    Raises:
        RemoteError: They can't be listed, or the bucket does not exist.
    """
    root = store.path(below) if below else store.path()
    shown = f"{store.url}/{below}" if below else store.url

    def look() -> dict[str, Any]:
        with store.use() as filesystem:
            filesystem.invalidate_cache()
            if store.listed_at_once:
                found: dict[str, Any] = filesystem.find(root, detail=True)
                return found
            return dict(_walk(filesystem, root))

    try:
        found = patiently(look, retries, f"list {shown}")
    except FileNotFoundError as error:
        absent(store, error)
        return {}
    start = f"{root.strip('/')}/"
    # The consoles of some stores mark a folder by an empty object whose name ends in a slash.
    files = [path for path in found if not path.endswith("/") and _is_file(found[path])]
    names = {path.strip("/").removeprefix(start): path for path in files}
    return {
        name: RemoteFile.of(found[path])
        for name, path in names.items()
        if _stays_inside(name) and path.strip("/").startswith(start)
    }


def absent(store: Store, error: FileNotFoundError) -> None:
    """Return if a folder merely isn't there yet.

    Raises:
        RemoteError: Its bucket isn't there either. Seen as empty, a run would start from scratch.
    """
    if store.scheme == "memory" or not store.of_objects:
        return
    codes = [getattr(cause, "response", None) for cause in (error, error.__cause__)]
    if any(
        isinstance(code, dict) and code["Error"].get("Code") == "NoSuchBucket" for code in codes
    ):
        _no_container(store, error)
    if store.is_s3:
        return
    try:
        with store.use() as filesystem:
            filesystem.ls(store.container, detail=False)
    except FileNotFoundError as missing:
        _no_container(store, missing)
    except Exception:
        # Who may not list the whole bucket is not told whether it is there.
        return


def _no_container(store: Store, error: Exception) -> NoReturn:
    raise RemoteError(
        f"{store.url} can't be used: there is no bucket {store.container!r} ({said(error)}). Check "
        "the URL and the endpoint, or create the bucket"
    ) from clean(error)


def _walk(filesystem: Any, folder: str) -> Iterator[tuple[str, Any]]:
    # fsspec's own walk takes a folder that can't be listed for one without files.
    for info in filesystem.ls(folder, detail=True):
        if info["type"] == "file":
            yield info["name"], info
        elif info["type"] == "directory" and info["name"].rstrip("/") != folder.rstrip("/"):
            try:
                inner = list(_walk(filesystem, info["name"].rstrip("/")))
            except FileNotFoundError:
                continue  # Somebody removed it meanwhile.
            yield from inner


def _is_file(info: Mapping[str, Any]) -> bool:
    return bool(info.get("type", "file") == "file")


def _stays_inside(name: str) -> bool:
    return not any(part in ("", ".", "..") or "\0" in part for part in name.split("/"))


def unusable_folder(name: str) -> str | None:
    """Return why a checkpoint of a store can't be a folder here, or None if it can.

    Example:
        >>> unusable_folder("CKPT+" + "x" * 400), unusable_folder("CKPT+a")
        ('its name has 405 bytes, 205 are possible', None)
    """
    return _unusable(name, _LONGEST_FOLDER)


def unusable_files(names: Collection[str]) -> dict[str, str]:
    """Return which objects of a checkpoint can't be files here, and why.

    In a store, names are only text: one may be that of a file and that of a folder.

    Example:
        >>> unusable_files(["CKPT.yaml", "CKPT.yaml/x", "model.ckpt"])
        {'CKPT.yaml/x': "'CKPT.yaml' is a file, too"}
    """
    files = set(names)
    found = {}
    for name in names:
        parts = name.split("/")
        above = ["/".join(parts[:count]) for count in range(1, len(parts))]
        file = next((each for each in above if each in files), None)
        if len(parts) > _DEEPEST:
            found[name] = f"it is in {len(parts) - 1} folders, {_DEEPEST - 1} are possible"
        elif file is not None:
            found[name] = f"{file!r} is a file, too"
        elif reasons := [why for part in parts if (why := _unusable(part, _LONGEST_FILE))]:
            found[name] = reasons[0]
    return found


def _unusable(name: str, longest: int) -> str | None:
    wrong = _FORBIDDEN.search(name)
    if wrong is not None:
        return f"its name has the character {wrong.group()!r}"
    size = len(name.encode())
    return f"its name has {size} bytes, {longest} are possible" if size > longest else None


def _seconds(value: object) -> float | None:
    if isinstance(value, datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
        return aware.timestamp()
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str):
        try:
            return _seconds(datetime.fromisoformat(value.replace("Z", "+00:00")))
        except ValueError:
            return None
    return None
