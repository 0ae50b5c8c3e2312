"""Opening a store through fsspec: the library for its scheme, bounded waits, an error that helps.

fsspec is imported here and only when a URL is used. Credentials and endpoints are fsspec's matter:
its configuration files and variables (`FSSPEC_S3_ENDPOINT_URL`), and those of the library below it
(`AWS_ACCESS_KEY_ID`, and so on).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any

from lightning_sbckpt._remote import sftp
from lightning_sbckpt._remote.retries import clean, hide, passes, said
from lightning_sbckpt.errors import ConfigurationError, MissingDependencyError, RemoteError

# What to install for a scheme.
EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "abfs": "azure",
    "abfss": "azure",
    "adl": "azure",
    "az": "azure",
    "sftp": "sftp",
    "ssh": "sftp",
}
# Stores of objects: no folders to make or remove, every object put in one step, and all objects
# below a prefix listed by one series of requests.
_OBJECTS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "r2", "memory")
_S3 = ("s3", "s3a")
_SFTP = ("sftp", "ssh")
_LISTED_AT_ONCE = ("s3", "s3a", "gs", "gcs", "memory")

# A server that hangs must not hang us: seconds until a connection stands, and until an answer comes.
_CONNECT_SECONDS = 10
_ANSWER_SECONDS = 30
# What is sent gets as long again for each of so many bytes; with four requests at once that is 1 MB/s
# in all. A slower connection needs a longer `read_timeout`.
_SENT_WITHIN_AN_ANSWER = 8 * 2**20


class Store:
    """The filesystem of a URL, opened when first used, in a process that was forked, and when lost.

    The connections and the thread of an asynchronous filesystem do not survive a fork, and fsspec
    gives such an instance to both sides unless told otherwise.

    Args:
        url: Of a folder.
        options: For the constructor of fsspec's filesystem.
    """

    def __init__(self, url: str, options: Mapping[str, object] | None = None) -> None:
        self.url = url
        self.scheme = url.partition("://")[0]
        self._options = dict(options or {})
        self._pid = -1
        self._filesystem: Any = None
        self._one_at_a_time = RLock()
        hide(self._options)

    @property
    def of_objects(self) -> bool:
        """Whether the store has no folders, and puts every object in one step."""
        return self.scheme in _OBJECTS

    @property
    def is_s3(self) -> bool:
        """Whether it speaks S3, and s3fs makes requests for us."""
        return self.scheme in _S3

    @property
    def is_sftp(self) -> bool:
        """Whether it has folders, and puts every small file in one step all the same."""
        return self.scheme in _SFTP

    @property
    def listed_at_once(self) -> bool:
        """Whether everything below a folder is listed by one call."""
        return self.scheme in _LISTED_AT_ONCE

    @property
    def parallel(self) -> bool:
        """Whether several threads may use the filesystem at once."""
        return bool(getattr(_class_for(self.url), "async_impl", False))

    @property
    def filesystem(self) -> Any:
        """The filesystem of fsspec.

        Raises:
            MissingDependencyError: The library for the scheme is not installed.
            RemoteError: It can't be opened.
            Exception: It can't be opened now, for a reason that passes.
        """
        if self._pid != os.getpid():
            # Held, maybe, by a thread that the forked process does not have.
            self._one_at_a_time = RLock()
            self._filesystem = None
            self._pid = os.getpid()
        with self._one_at_a_time:
            if self._filesystem is None:
                self._filesystem = open_filesystem(self.url, self._options)
            return self._filesystem

    @contextmanager
    def use(self) -> Iterator[Any]:
        """Give the filesystem, to one thread at a time if it can't serve several."""
        if self.parallel:
            yield self.filesystem
            return
        filesystem = self.filesystem
        with self._one_at_a_time:
            # Another thread may have found it lost meanwhile.
            filesystem = self.filesystem
            try:
                yield filesystem
            except Exception as error:
                usable_after = getattr(filesystem, "usable_after", None)
                if usable_after is None or usable_after(error):
                    raise
                self._forget()
                if passes(error):
                    raise
                raise ConnectionError(f"the connection was lost: {said(error)}") from clean(error)

    def _forget(self) -> None:
        """Give up a connection that is no longer one; the next use opens another."""
        lost, self._filesystem = self._filesystem, None
        if lost is not None:
            lost.close()

    def patience(self, size: int) -> dict[str, float]:
        """Return the argument that bounds one request which sends so many bytes.

        The libraries bound the wait for an answer, and not the one for a server that is to take what
        is sent: one that hangs just then would be waited on for ever.
        """
        if not self.parallel:
            return {}
        waits = getattr(self.filesystem, "config_kwargs", {})
        answer = float(waits.get("read_timeout", _ANSWER_SECONDS))
        return {"timeout": answer * (1 + size / _SENT_WITHIN_AN_ANSWER)}

    def path(self, *parts: str) -> str:
        """Return the filesystem's own path of the folder, or of something in it; "" is itself."""
        root = str(_class_for(self.url)._strip_protocol(self.url)).rstrip("/")  # noqa: SLF001
        return "/".join([root, *filter(None, parts)])

    @property
    def container(self) -> str:
        """The filesystem's own path of what must exist before anything can be put: the bucket."""
        first, *_ = self.path().lstrip("/").split("/")
        return first


def open_filesystem(url: str, options: Mapping[str, object]) -> Any:
    """Return a new filesystem of fsspec for a URL, with bounded waits and no retries of its own.

    Raises:
        MissingDependencyError: fsspec, or the library for the scheme, is not installed.
        ConfigurationError: fsspec does not know the scheme.
        RemoteError: It can't be opened: wrong options, a server that refuses.
        Exception: The server can't be reached now.
    """
    scheme = url.partition("://")[0]
    kind = _class_for(url)
    import fsspec

    try:
        # By the URL the library finds the host and the user of such as sftp://.
        found = kind._get_kwargs_from_urls(url)  # noqa: SLF001
        bounded = _bounded(scheme, fsspec.config.conf, options)
        # An instance that another part of the program uses would have its settings, not ours.
        made = kind(**{**found, **bounded, "skip_instance_cache": True})
    except ImportError as error:
        raise _missing(url, scheme, error) from clean(error)
    except Exception as error:
        if passes(error):
            raise
        raise RemoteError(
            f"can't open {url}: {said(error)}. Check the URL, the credentials and storage_options"
        ) from clean(error)
    if scheme in _S3:
        made.retries = 1
    return made


def _class_for(url: str) -> type[Any]:
    """Return the class of filesystems for a URL."""
    scheme = url.partition("://")[0]
    try:
        import fsspec

        kind: type[Any] = fsspec.get_filesystem_class(scheme)
        if scheme in _SFTP:
            kind = sftp.sftp_class()
    except ImportError as error:
        raise _missing(url, scheme, error) from clean(error)
    except ValueError as error:
        raise ConfigurationError(
            f"{url} can't be used: fsspec knows no store for {scheme}://. Known are, among others, "
            "s3://, gs://, abfs:// and sftp://; a folder on this machine is given by its path"
        ) from clean(error)
    return kind


def _bounded(
    scheme: str, configured: Mapping[str, Mapping[str, object]], options: Mapping[str, object]
) -> dict[str, object]:
    """Return the options with bounds for waiting; what the user has set stays."""
    given = dict(options)
    if scheme in _SFTP:
        given = {**configured.get(scheme, {}), **given}
        return sftp.bounded(given, _CONNECT_SECONDS, _ANSWER_SECONDS)
    if scheme in _OBJECTS:
        # What was listed a moment ago is not what is there: other processes write, too.
        given.setdefault("use_listings_cache", False)
    if scheme in _S3:
        bounds = {
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _ANSWER_SECONDS,
            "retries": {"total_max_attempts": 1},
        }
        # fsspec replaces a whole configured option by one that is passed.
        before = configured.get(scheme, {}).get("config_kwargs", {})
        mine = given.get("config_kwargs", {})
        if isinstance(before, Mapping) and isinstance(mine, Mapping):
            given["config_kwargs"] = {**bounds, **before, **mine}
    return given


def _missing(url: str, scheme: str, error: ImportError) -> MissingDependencyError:
    extra = EXTRAS.get(scheme)
    how = f"pip install 'lightning-sbckpt[{extra}]'" if extra else f"what it asks for: {error}"
    return MissingDependencyError(
        f"can't use {url}: a library for {scheme}:// is not installed ({said(error)}). Install it "
        f"with: {how}"
    )
