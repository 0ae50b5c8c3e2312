"""Marks that say of a file that this user's own runs wrote it.

A mark is the comment of the zip archive that a torch file is, so it goes wherever the file goes, and
other readers pass it over. It holds the HMAC-SHA-256 of all other bytes, of the file's name and of the
version of this format, with the user's newest secret; which secret; and what is in the file.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_sbckpt._format.keys import SECRET, SECRET_FILE, keys

_FORMAT = "1"
_END = b"PK\x05\x06"
_END_SIZE = 22
_LENGTH = slice(20, 22)
_MOST_HELD = 50
_LONGEST = 200

TRUST = (
    "if you trust whoever wrote it, pass trust_pickle=True, or load it inside "
    "`with lightning_sbckpt.trusting_pickle():` (it can run any code that they chose)"
)


@dataclass(frozen=True)
class Judgement:
    """What a mark says.

    Attributes:
        authentic: Whether this user's own runs wrote the file.
        reason: Why not.
        holds: What is in the file, as far as it says so; not to be relied on unless authentic.
    """

    authentic: bool
    reason: str = ""
    holds: tuple[str, ...] = ()


def mark(data: bytes, name: str, near: Path | None, holds: Sequence[str] = ()) -> bytes:
    """Return the bytes of a torch file with a mark.

    Args:
        data: The file, as torch writes it.
        name: What it will be called.
        near: The folder of all checkpoints that it belongs to.
        holds: What is in it, for messages.
    """
    if data[-_END_SIZE : -_END_SIZE + 4] != _END:
        raise ValueError("expected a zip archive without a comment")
    # As ASCII: nothing of a file goes to a terminal as it is, and a comment has at most 64 KB.
    told = [ascii(text[:_LONGEST])[1:-1][:_LONGEST] for text in holds[:_MOST_HELD]]
    if len(holds) > _MOST_HELD:
        told.append(f"and {len(holds) - _MOST_HELD} more")
    body = data[:-2]
    made = {_identity(k): _hmac(k, body, name, told) for k in keys(near, create=True).marking}
    comment = _comment(made, told)
    return body + len(comment).to_bytes(2, "little") + comment


def root_of(path: Path) -> Path | None:
    """Return the folder of all checkpoints, of a file in one of them; None of any other file."""
    folder = path.absolute().parent
    return folder.parent if folder.name.startswith(("CKPT", ".staging+")) else None


def judge(data: bytes, name: str, near: Path | None) -> Judgement:
    """Return whether this user's own runs wrote a file; compared in constant time.

    Args:
        data: All bytes of the file: those that are going to be read, and no others.
        name: What it is called.
        near: The folder of all checkpoints that it belongs to.
    """
    start = data.rfind(_END)
    end, comment = data[start : start + _END_SIZE], data[start + _END_SIZE :]
    if start < 0 or not comment or end[_LENGTH] != len(comment).to_bytes(2, "little"):
        return Judgement(False, "it has no mark of this user's runs")
    try:
        fields = json.loads(comment)
        marks, holds = fields["marks"], fields["holds"]
        # In this very form, so that nothing of the comment goes unread.
        whole = _comment(marks, holds) == comment and all(type(text) is str for text in holds)
    except Exception:
        whole = False
    if not whole or type(marks) is not dict:
        return Judgement(False, "it has no mark of this user's runs")
    shown = tuple(ascii(text[:_LONGEST])[1:-1] for text in holds[: _MOST_HELD + 1])
    found = keys(near, create=False)
    body = data[: start + _END_SIZE - 2]
    for key in found.known:
        claimed = marks.get(_identity(key))
        if isinstance(claimed, str):
            expected = _hmac(key, body, name, holds)
            if hmac.compare_digest(expected.encode(), claimed.encode()):
                return Judgement(True, "", shown)
            return Judgement(False, f"its mark is not that of {name} with these bytes", shown)
    reason = "it is marked with a secret that is not known here"
    if found.problem is not None:
        reason += f" ({found.problem})"
    share = (
        f". If it is yours, from another machine or user, share the secret: copy its file, or set {SECRET} "
        f"or {SECRET_FILE}"
    )
    return Judgement(False, reason + share, shown)


def _comment(marks: dict[str, str], holds: list[str]) -> bytes:
    fields = {"lightning-sbckpt": int(_FORMAT), "marks": marks, "holds": holds}
    return json.dumps(fields).encode()


def _hmac(key: bytes, body: bytes, name: str, holds: list[str]) -> str:
    made = hmac.new(key, digestmod=hashlib.sha256)
    # No part can hold a zero byte, so no two files have the same beginning.
    context = f"lightning-sbckpt\0{_FORMAT}\0{name}\0{json.dumps(holds)}\0"
    made.update(context.encode(errors="surrogatepass"))
    made.update(body)
    return made.hexdigest()


def _identity(key: bytes) -> str:
    return hashlib.sha256(b"lightning-sbckpt key\0" + key).hexdigest()[:16]
