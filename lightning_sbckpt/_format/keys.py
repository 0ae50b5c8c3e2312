"""The secrets by which a user's own files are known.

They are kept in a file that only the user may read, one a line: `$XDG_CONFIG_HOME/lightning-sbckpt/secrets`
(`~/.config/...`), made when the first one is needed. On a cluster or in a container they may come from
the environment instead. The last one marks new files, all of them are accepted, so a secret is
replaced by adding one.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.typing import World

SECRET = "LIGHTNING_SBCKPT_SECRET"  # noqa: S105 - the name of a variable
SECRET_FILE = "LIGHTNING_SBCKPT_SECRET_FILE"  # noqa: S105

_SHORTEST = 32
_LONGEST_FILE = 2**16
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_ATTEMPTS = 20


@dataclass(frozen=True)
class Keys:
    """Secrets.

    Attributes:
        known: All that are accepted.
        marking: Those that new files are marked with.
        problem: Why none of them outlives this process; None if one does.
    """

    known: tuple[bytes, ...]
    marking: tuple[bytes, ...]
    problem: str | None = None


class _Job:
    """The secret of this job alone, which no file holds; known to all of its ranks once shared."""

    key: bytes | None = None
    shared = False


def _of_this_job() -> bytes:
    if _Job.key is None:
        _Job.key = secrets.token_hex(32).encode()
    return _Job.key


def share_with_ranks(world: World) -> None:
    """Have every rank accept what rank zero will mark, whichever secrets its machine has.

    No secret that outlives the job goes to another rank.

    Args:
        world: The ranks; all of them call this.
    """
    if world.size > 1:
        _Job.key = world.broadcast(_of_this_job())
        _Job.shared = True


class _UnusableError(Exception):
    """The user's file of secrets can't be used; the message says why."""


def keys(near: Path | None, *, create: bool) -> Keys:
    """Return the secrets of this user.

    Args:
        near: The folder of all checkpoints that they are used for: secrets may not lie in it.
        create: Make one if there is none.

    Returns:
        The secrets. Without one that lasts, what this process itself marks is still accepted in it.

    Raises:
        ConfigurationError: The environment names secrets that can't be used.
    """
    given = _from_environment(near)
    own: tuple[bytes, ...] = ()
    problem = None
    try:
        path = user_file()
        own = _read(path, near)
        if not own and create and not given:
            _refuse_among_checkpoints(path, near)
            _create(path)
            own = _read(path, near)
    except _UnusableError as error:
        problem = str(error)
    lasting, of_job = (*own, *given), _of_this_job()
    if not lasting:
        return Keys((of_job,), (of_job,), problem or f"there is no secret in {path}")
    also = (of_job,) if _Job.shared else ()
    return Keys((*lasting, of_job), (lasting[-1], *also))


def user_file() -> Path:
    """Return where the user's secrets are kept, whether there are any or not."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if Path(base).is_absolute():
        return Path(base, "lightning-sbckpt", "secrets")
    try:
        return Path.home() / ".config" / "lightning-sbckpt" / "secrets"
    except RuntimeError as error:
        raise _UnusableError("this user has no home folder") from error


def _from_environment(near: Path | None) -> tuple[bytes, ...]:
    found: tuple[bytes, ...] = ()
    file = os.environ.get(SECRET_FILE)
    if file:
        try:
            found = _read(Path(file), near)
        except _UnusableError as error:
            raise ConfigurationError(f"{SECRET_FILE} can't be used: {error}") from error
        if not found:
            raise ConfigurationError(f"{SECRET_FILE} can't be used: there is no secret in {file}")
    words = os.environ.get(SECRET, "").split()
    if any(len(word) < _SHORTEST for word in words):
        raise ConfigurationError(
            f"{SECRET} can't be used: a secret has at least {_SHORTEST} characters. Make one: "
            'python -c "import secrets; print(secrets.token_hex(32))"'
        )
    return (*found, *(word.encode() for word in words))


def _read(path: Path, near: Path | None) -> tuple[bytes, ...]:
    """Return the secrets in a file; none if there is no file."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            # Where there are no hard links, another process may have made it and not written it yet.
            time.sleep(0.05)
        try:
            data = _private_bytes(path)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise _UnusableError(f"{path} can't be read: {error.strerror or error}") from error
        if data.endswith(b"\n") or len(data) >= _SHORTEST:
            break
    _refuse_among_checkpoints(path, near)
    lines = [line.strip() for line in data.splitlines()]
    found = tuple(line for line in lines if line and not line.startswith(b"#"))
    if not found or any(len(line) < _SHORTEST for line in found):
        raise _UnusableError(
            f"{path} does not hold secrets, one a line, each of at least {_SHORTEST} characters"
        )
    return found


def _private_bytes(path: Path) -> bytes:
    """Return the bytes of a file that nobody but its owner can read or write."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _UnusableError(f"{path} is no regular file")
        # Those of the system's administrator are mounted into containers.
        if found.st_uid not in (os.geteuid(), 0):
            raise _UnusableError(f"{path} belongs to another user")
        if found.st_mode & _OTHERS:
            raise _UnusableError(
                f"{path} can be used by others (mode {stat.S_IMODE(found.st_mode):04o}): chmod 600 it, "
                "and replace the secret if somebody may have read it"
            )
        return os.read(descriptor, _LONGEST_FILE)
    finally:
        os.close(descriptor)


def _refuse_among_checkpoints(path: Path, near: Path | None) -> None:
    real = path.resolve()
    beside = near is not None and real.is_relative_to(near.resolve())
    if beside or any(
        parent.name.startswith("CKPT") and (parent / "CKPT.yaml").exists()
        for parent in real.parents
    ):
        raise _UnusableError(
            f"{path} lies in a folder of checkpoints, with which it would be copied and shared: set "
            "XDG_CONFIG_HOME to another folder"
        )


def _create(path: Path) -> None:
    """Make the file with a new secret, unless another process was faster."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    staged = path.with_name(f".secrets+{os.getpid()}+{secrets.token_hex(4)}")
    data = secrets.token_hex(32).encode() + b"\n"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(os.open(staged, flags, 0o600), data)
        try:
            # Whole from the first moment on, and never in the place of another.
            os.link(staged, path)
        except FileExistsError:
            return
        except OSError:
            # A filesystem without hard links.
            with suppress(FileExistsError):
                _write(os.open(path, flags, 0o600), data)
        finally:
            staged.unlink()
    except OSError as error:
        raise _UnusableError(f"{path} can't be written: {error.strerror or error}") from error


def _write(descriptor: int, data: bytes) -> None:
    try:
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
