"""What is said of a checkpoint after it was saved: `ANNOTATIONS.yaml` inside its folder.

`CKPT.yaml` and `MANIFEST.yaml` never change once a checkpoint is published, so that their checksums
hold. Metrics computed later, notes, tags and the reason why a checkpoint is pinned go into this
file. Like the manifest it ends with its own checksum; and it names the `unixtime` of its checkpoint,
so that one which came from another folder is not taken for its own.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning_sbckpt._format.yaml import MAX_META_BYTES, parse_yaml
from lightning_sbckpt._io.inside import open_folder
from lightning_sbckpt._io.open_regular import NotRegularError, read_regular
from lightning_sbckpt._io.storage import LocalStorage, digest_bytes
from lightning_sbckpt.errors import CheckpointNotFoundError, MetaError, SaveError
from lightning_sbckpt.meta import META_NAME, dump_meta, plain_meta, read_meta

logger = logging.getLogger("lightning_sbckpt")

ANNOTATIONS_NAME = "ANNOTATIONS.yaml"
FORMAT_VERSION = 1
_CHECKSUM_KEY = "annotations-checksum"

# What a checkpoint was saved with, and what the other fields of the file are shown as.
_RESERVED = ("unixtime", "end-of-epoch", "pinned", "notes", "tags")

_LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class Annotations:
    """What was said of one checkpoint.

    Attributes:
        meta: Keys computed later; they count as if they had been saved, and before what was saved.
        pinned: Why retention must not remove the checkpoint, or None if it may.
        notes: Sentences for people, oldest first.
        tags: Words to find the checkpoint by.
    """

    meta: Mapping[str, object] = field(default_factory=dict)
    pinned: str | None = None
    notes: Sequence[str] = ()
    tags: Sequence[str] = ()

    def over(self, saved: Mapping[str, object]) -> dict[str, object]:
        """Return the meta of a checkpoint as readers see it: as saved, and these over it."""
        said = {"pinned": self.pinned, "notes": list(self.notes), "tags": list(self.tags)}
        return {**saved, **self.meta, **{key: value for key, value in said.items() if value}}


def annotate(
    folder: Path,
    meta: Mapping[str, object],
    *,
    storage: LocalStorage,
    note: str | None = None,
    tags: Sequence[str] = (),
) -> Annotations:
    """Add to what is said of a checkpoint; durable when this returns, old or new at every instant.

    Args:
        folder: The checkpoint.
        meta: Keys and values, as those given at save; those annotated before under another key stay.
        storage: The disk.
        note: A sentence to add to the notes.
        tags: Words to add to the tags.

    Returns:
        All that is said of the checkpoint now.

    Raises:
        MetaError: YAML can't hold a value, a key can't be annotated, or the annotations or the
            meta that are there can't be read.
        CheckpointNotFoundError: There is no checkpoint, or it was removed meanwhile.
        SaveError: It could not be written; what was said before holds.
    """
    added = plain_meta(meta)
    words: Sequence[object] = tags
    sentence: object = note
    _refuse_reserved(added, f"{folder} can't be annotated")
    if isinstance(tags, str) or not all(isinstance(word, str) and word for word in words):
        raise MetaError(
            f"{folder} can't be annotated with tags={tags!r}: expected a list of words that are "
            "not empty, such as tags=['release']"
        )
    if sentence is not None and not (isinstance(sentence, str) and sentence):
        raise MetaError(f"{folder} can't be annotated with note={note!r}: expected a sentence")
    _require_readable(folder, {"note": note, "tags": list(tags)})
    notes = [] if note is None else [str.__str__(note)]
    return _change(
        folder,
        lambda old: replace(
            old,
            meta={**old.meta, **added},
            notes=[*old.notes, *notes],
            tags=list(dict.fromkeys([*old.tags, *map(str.__str__, tags)])),
        ),
        storage,
    )


def pin(folder: Path, reason: str | None = None, *, storage: LocalStorage) -> Annotations:
    """Protect a checkpoint from retention, and say why; raises as `annotate` does."""
    if reason is not None and not isinstance(reason, str):
        raise MetaError(f"{folder} can't be pinned with reason={reason!r}: expected a sentence")
    _require_readable(folder, {"reason": reason})
    why = str.__str__(reason) if reason else "pinned"
    return _change(folder, lambda old: replace(old, pinned=why), storage)


def unpin(folder: Path, *, storage: LocalStorage) -> Annotations:
    """Let retention remove a checkpoint again; raises as `annotate` does."""
    return _change(folder, lambda old: replace(old, pinned=None), storage)


def read_annotations(folder: Path) -> Annotations | None:
    """Return what is said of a checkpoint, or None if nothing is.

    Raises:
        MetaError: The annotations are damaged, of another checkpoint, or of an unknown format.
        OSError: The file can't be read.
    """
    try:
        return _read(folder, read_meta(folder / META_NAME))
    except FileNotFoundError:
        return None


@contextmanager
def annotations_held(folder: Path) -> Iterator[Annotations | None]:
    """Give what is said of a checkpoint, and let nobody say more until the end of the block.

    Annotations that can't be read are no pin here: see `annotated`, which has warned of them.

    Raises:
        CheckpointNotFoundError: There is no checkpoint, or it was removed meanwhile.
        SaveError: Another process has been annotating it all the time.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(folder))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointNotFoundError(f"{folder} was removed meanwhile") from error
        try:
            found = read_annotations(folder)
        except (MetaError, OSError):
            found = None
        yield found


def annotated(folder: Path, saved: dict[str, object]) -> dict[str, object]:
    """Return the meta that a checkpoint was saved with, and what was said of it later.

    Annotations that can't be read are left out with a warning. Whether they pinned the checkpoint
    can't be told then: it counts as pinned, since what is removed does not come back.
    """
    try:
        found = _read(folder, saved)
    except (MetaError, OSError) as error:
        logger.warning(
            "left out the annotations of a checkpoint, which counts as pinned: %s", error
        )
        found = Annotations(pinned=f"can't tell: {ANNOTATIONS_NAME} can't be read")
    return saved if found is None else found.over(saved)


def _read(folder: Path, saved: Mapping[str, object]) -> Annotations | None:
    path = folder / ANNOTATIONS_NAME
    try:
        data = read_regular(path, MAX_META_BYTES)
    except FileNotFoundError:
        return None
    except NotRegularError as error:
        raise MetaError(f"{path} can't be read: {error.strerror}") from error
    body, _, last = data.removesuffix(b"\n").rpartition(b"\n")
    if last != _checksum_line(body + b"\n"):
        raise MetaError(
            f"{path} is damaged: its last line is not the checksum of the others. Remove the file "
            "to annotate the checkpoint anew"
        )
    fields = parse_yaml(body, path)
    if fields.get("format") != FORMAT_VERSION:
        raise MetaError(
            f"{path} has format {fields.get('format')!r}, this release reads {FORMAT_VERSION}: "
            "use the release of lightning-sbckpt that wrote it, or a newer one"
        )
    # By their text, since NaN differs from NaN.
    if repr(fields.get("of")) != repr(saved.get("unixtime")):
        raise MetaError(
            f"{path} is of another checkpoint: of one with unixtime {fields.get('of')!r}, this has "
            f"{saved.get('unixtime')!r}. Remove the file to annotate the checkpoint anew"
        )
    return _checked(fields, path)


def _checked(fields: Mapping[str, object], path: Path) -> Annotations:
    meta, pinned = fields.get("meta"), fields.get("pinned")
    notes, tags = fields.get("notes"), fields.get("tags")
    if (
        not isinstance(meta, dict)
        or not isinstance(pinned, (str, type(None)))
        or not isinstance(notes, list)
        or not isinstance(tags, list)
        or not all(isinstance(word, str) for word in [*meta, *notes, *tags])
    ):
        raise MetaError(f"{path} is damaged: it does not hold meta, pinned, notes and tags")
    _refuse_reserved(meta, f"{path} can't be used")
    return Annotations(meta, pinned, notes, tags)


def _refuse_reserved(meta: Mapping[str, object], failure: str) -> None:
    refused = [key for key in meta if key in _RESERVED]
    if refused:
        raise MetaError(
            f"{failure}: it says {', '.join(map(repr, refused))}. 'unixtime' and 'end-of-epoch' are "
            "what the checkpoint was saved with and can't be changed; 'pinned', 'notes' and 'tags' "
            "are set by pin(), note= and tags=. Choose other keys"
        )


def _require_readable(folder: Path, texts: Mapping[str, object]) -> None:
    """Refuse texts that could be written, but not read again."""
    try:
        plain_meta(texts)
    except MetaError as error:
        raise MetaError(f"{folder} can't be annotated: {error}") from error


def _checksum_line(body: bytes) -> bytes:
    return f"{_CHECKSUM_KEY}: {digest_bytes(body).xxh3_128}".encode()


def _change(
    folder: Path, change: Callable[[Annotations], Annotations], storage: LocalStorage
) -> Annotations:
    path = folder / ANNOTATIONS_NAME
    try:
        # Read and written under one lock: of two processes that add something, neither loses it.
        with _locked(folder):
            saved = read_meta(folder / META_NAME)
            new = change(_read(folder, saved) or Annotations())
            storage.replace(path, _dump(new, saved.get("unixtime"), path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(
            f"{folder} is not annotated: there is no checkpoint (a folder with a {META_NAME}), or "
            "it was removed meanwhile"
        ) from error
    except OSError as error:
        raise SaveError(
            f"{path} can't be written: {error.strerror or error}. The checkpoint is as it was, with "
            "what was said of it before"
        ) from error
    return new


def _dump(annotations: Annotations, unixtime: object, path: Path) -> bytes:
    body = dump_meta(
        {
            "format": FORMAT_VERSION,
            "of": unixtime,
            "pinned": annotations.pinned,
            "tags": list(annotations.tags),
            "notes": list(annotations.notes),
            "meta": dict(annotations.meta),
        }
    )
    data = body + _checksum_line(body) + b"\n"
    if len(data) > MAX_META_BYTES:
        raise MetaError(
            f"{path} would have {len(data):,} bytes, more than the {MAX_META_BYTES:,} that can be "
            "read again: put large values into files of your own"
        )
    return data


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other annotating processes and threads away from a checkpoint."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        descriptor = open_folder(folder)
        try:
            if _try_lock(descriptor):
                # Another checkpoint of this name may have come in its place while we waited.
                if os.path.samestat(os.fstat(descriptor), folder.stat()):
                    yield
                    return
            elif time.monotonic() > deadline:
                raise SaveError(
                    f"{folder} can't be annotated: another process has been annotating it for "
                    f"{_LOCK_SECONDS:g} seconds. Try again when it is done"
                )
            else:
                time.sleep(0.005)
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # A filesystem without locks: the rename alone has to do.
    return True
