"""Telling the URL of a remote store from a path, also after it went through `pathlib`.

`Path("s3://bucket/run")` is `s3:/bucket/run`, and users pass such paths on without noticing. One
letter before a colon is a Windows drive, so schemes have two or more.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lightning_sbckpt.errors import ConfigurationError

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]+):(?P<slashes>/+)(?P<rest>.*)", re.DOTALL)
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+::")
_PASSWORD = re.compile(r"(:/+[^/:?\[]*:)(?!\d+(?:/|$)).*@", re.DOTALL)
_SIGNED = re.compile(
    r"(?i)([?&;][^=&;]*(?:token|secret|passw|sig|key|credential|auth)[^=&;]*=)[^&;#]+"
)
# What fsspec calls the disk of this machine.
_LOCAL = ("file", "local")


def is_url(path: object) -> bool:
    """Return whether something names a place by URL, such as `s3://bucket/run`.

    Example:
        >>> is_url("s3://bucket/run"), is_url(Path("s3://bucket/run")), is_url("C:/run")
        (True, True, False)
    """
    if not isinstance(path, (str, os.PathLike)):
        return False
    text = os.fspath(path)
    return isinstance(text, str) and bool(_URL.match(text) or _CHAIN.match(text))


def normal_url(path: str | os.PathLike[str]) -> str:
    """Return a URL as it was before `pathlib`, without a slash at its end.

    Raises:
        ConfigurationError: It is no URL, or a chain of several, such as `filecache::s3://bucket`, or
            it has a password or a token in it.

    Example:
        >>> normal_url(Path("s3://bucket/run/"))
        's3://bucket/run'
    """
    text = os.fspath(path)
    found = _URL.match(text)
    if found is None:
        raise ConfigurationError(
            f"{without_secret(text)!r} can't be used as the URL of a folder: expected one scheme and a path, such "
            "as s3://bucket/run"
        )
    scheme, rest = found["scheme"].lower(), found["rest"].rstrip("/")
    # An absolute path on this machine keeps the slash that it begins with, in `file:///tmp`.
    if scheme in _LOCAL:
        return f"{scheme}:///{rest}"
    url = f"{scheme}://{rest}"
    shown = without_secret(url)
    if shown != url:
        raise ConfigurationError(
            f"{shown} has a password or a token in it, which would show up in logs and files: leave "
            "it out and give it as storage_options={...} or in fsspec's configuration"
        )
    return url


def without_secret(text: str) -> str:
    """Return a URL as it may be shown: what opens a store is left out.

    That is what stands between the first colon and the last `@`, unless it is a port, and each value
    of a parameter whose name says so.

    Example:
        >>> without_secret("s3://key:a/b@bucket/run"), without_secret("http://host:80/run?sig=x&v=1")
        ('s3://key:...@bucket/run', 'http://host:80/run?sig=...&v=1')
    """
    return _SIGNED.sub(r"\1...", _PASSWORD.sub(r"\1...@", text))


def local_path(path: str | os.PathLike[str]) -> Path | None:
    """Return where on this machine's disk a path or URL is, or None if it is elsewhere.

    Example:
        >>> local_path("file:///data/run"), local_path("run"), local_path("s3://bucket/run")
        (PosixPath('/data/run'), PosixPath('run'), None)
    """
    if not is_url(path):
        return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises without a home
    scheme, _, rest = normal_url(path).partition("://")
    return Path(rest) if scheme in _LOCAL else None
