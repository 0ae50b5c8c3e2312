"""The exceptions of this package.

Every one derives from `SBCheckpointError` and from the builtin that a caller would expect::

    SBCheckpointError(Exception)
    ├── HookError(RuntimeError)              no hook for an object, or a hook that failed
    │   └── HookSignatureError(TypeError)    a hook that cannot be called as promised
    ├── MetaError(ValueError)                meta that YAML cannot hold or that is not meta
    ├── SelectionError(ValueError)           contradicting or unusable ways to choose a checkpoint
    ├── ConfigurationError(ValueError)       arguments that contradict each other
    │   └── MixedPackagesError(TypeError)    objects of Lightning's two packages, put together
    ├── CheckpointNameError(ValueError)      a name that would not stay inside its folder
    ├── CheckpointNotFoundError(FileNotFoundError)  nothing there, or not a checkpoint
    ├── DamagedCheckpointError(RuntimeError) bytes that are not the bytes that were written
    ├── MismatchError(RuntimeError)          a checkpoint and the objects to load do not fit
    ├── UntrustedPickleError(RuntimeError)   state that could run code, not trusted
    ├── SaveError(RuntimeError)              a checkpoint could not be written
    │   └── FolderInUseError                 another process writes checkpoints to the folder
    ├── RemovalError(OSError)                a checkpoint that was to go could not be removed
    ├── RemoteError(OSError)                 a remote store that can't be reached, or refuses
    └── MissingDependencyError(ImportError)  an optional library that was asked for is not installed

A message says what failed, on which object and path, what was found against what was
expected, and what to do next.
"""

from __future__ import annotations

import reprlib

__all__ = [
    "CheckpointNameError",
    "CheckpointNotFoundError",
    "ConfigurationError",
    "DamagedCheckpointError",
    "FolderInUseError",
    "HookError",
    "HookSignatureError",
    "MetaError",
    "MismatchError",
    "MissingDependencyError",
    "MixedPackagesError",
    "RemoteError",
    "RemovalError",
    "SBCheckpointError",
    "SaveError",
    "SelectionError",
    "UntrustedPickleError",
]


class SBCheckpointError(Exception):
    """Base of every exception raised by this package.

    Attributes:
        failed_on_rank: The rank that it comes from, if that is another one.
    """

    failed_on_rank: int | None = None


class HookError(SBCheckpointError, RuntimeError):
    """An object has no hook for what was asked, or its hook failed."""


class HookSignatureError(HookError, TypeError):
    """A hook cannot be called with the arguments that it will be given."""


class MetaError(SBCheckpointError, ValueError):
    """Meta that cannot be written as plain YAML, or a meta file that holds no meta."""


class SelectionError(SBCheckpointError, ValueError):
    """Ways of choosing a checkpoint that contradict each other or cannot be used."""


class ConfigurationError(SBCheckpointError, ValueError):
    """Arguments that contradict each other, refused at construction."""


class MixedPackagesError(ConfigurationError, TypeError):
    """A Trainer was given a module of the other of Lightning's two packages."""


class CheckpointNameError(SBCheckpointError, ValueError):
    """A name of a checkpoint or recoverable that would not stay inside its folder."""


class CheckpointNotFoundError(SBCheckpointError, FileNotFoundError):
    """A path at which there is no checkpoint."""


class DamagedCheckpointError(SBCheckpointError, RuntimeError):
    """A checkpoint whose files are not the ones that were written."""


class MismatchError(SBCheckpointError, RuntimeError):
    """A checkpoint that lacks, or does not fit, what is to be loaded from it."""


class UntrustedPickleError(SBCheckpointError, RuntimeError):
    """State that could run code (pickle, above all), met without the user's explicit trust."""


class SaveError(SBCheckpointError, RuntimeError):
    """A checkpoint that could not be written; nothing of it is visible."""


class FolderInUseError(SaveError):
    """A folder to which another process writes checkpoints; the message names that process."""


class RemovalError(SBCheckpointError, OSError):
    """A checkpoint that was to go could not be removed; every other one is whole."""


class RemoteError(SBCheckpointError, OSError):
    """A remote store that can't be reached, or refuses; nothing half done is visible there."""


class MissingDependencyError(SBCheckpointError, ImportError):
    """An optional library that is not installed; the message says how to install it."""


class _Brief(reprlib.Repr):
    """Looks at the beginning of a value only, however large or deep it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100


_BRIEF = _Brief()


def brief(value: object, longest: int = 120) -> str:
    """Return a value from a file as text for a message: short, and in little time.

    Args:
        value: Anything.
        longest: The most characters.

    Example:
        >>> brief(list(range(1000))), brief("abcdef", longest=4)
        ('[0, 1, 2, 3, 4, 5, ...]', "'ab…")
    """
    try:
        text = _BRIEF.repr(value)
    except Exception:  # A number of thousands of digits; an object whose repr fails.
        text = f"a {type(value).__name__} that can't be printed"
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
