"""Trying again what failed for a reason that passes: a server that restarts, a lost connection.

The libraries below have retries of their own, each with its own idea of how often; those that can
be switched off are, so that the number and the time given here are the whole of it.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Event
from typing import TypeVar

from lightning_sbckpt._remote.urls import without_secret
from lightning_sbckpt.errors import ConfigurationError, RemoteError, SBCheckpointError

logger = logging.getLogger("lightning_sbckpt")

T = TypeVar("T")

# Of its own: what is drawn from Python's usual numbers, training would miss, and end with other bits.
_chance = random.SystemRandom()

# Where to look for the answer to "does it help to try again": the libraries of the stores wrap each
# other's errors, and have no base class in common.
_PASSING_NUMBERS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.EPIPE,
    errno.ETIMEDOUT,
    # Of looking up a name, which has numbers of its own: below zero.
    socket.EAI_AGAIN,
    # What s3fs makes of "internal error"; only some systems have it.
    getattr(errno, "EREMOTEIO", errno.EBUSY),
}
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
_PASSING_CLASSES = {
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
    "ConnectionError",  # requests and botocore have classes of this name that aren't the builtin
    "EndpointConnectionError",  # botocore
    "FSTimeoutError",  # fsspec
    "HTTPClientError",  # botocore
    "IncompleteRead",
    "NoValidConnectionsError",  # paramiko
    "ReadTimeoutError",
    "ResponseParserError",
    "ResponseStreamingError",
    "SSHException",  # paramiko
    "ServiceRequestError",  # azure
    "ServiceResponseError",
    "TransportError",  # google.auth
}
# What S3 answers with a status that would be final otherwise: bytes that were lost on the way.
_PASSING_CODES = {
    "BadDigest",
    "IncompleteBody",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
# Kinds of the above to which asking again changes nothing.
_LASTING_CLASSES = {
    "AuthenticationException",
    "BadHostKeyException",
    "ProxyConnectionError",
    "SSLError",
    "ClientConnectorCertificateError",
    "ClientSSLError",
    "ClientAuthenticationError",
}


# Names of options that hold what opens a store, and what was given under such names.
_SECRET = re.compile(
    "(?i)secret|passw|passphrase|token|key|credential|auth|sig|sas|connection_string|pkey"
)
_secrets: set[str] = set()
_SHORTEST = 4
_LONGEST_CHAIN = 20


@dataclass(frozen=True)
class Retries:
    """How often something is tried that failed for a reason that passes, and how long is waited.

    Attributes:
        attempts: How often it is tried in all.
        first_delay: Seconds until the second attempt; the next waits are twice as long each, and
            every one is shortened by up to half, at random, so that many processes don't come back
            at the same instant.
        longest_delay: The most seconds between two attempts.
    """

    attempts: int = 5
    first_delay: float = 1.5
    longest_delay: float = 10.0

    def __post_init__(self) -> None:
        """Refuse what can't be."""
        if self.attempts < 1 or self.first_delay < 0 or self.longest_delay < 0:
            raise ConfigurationError(
                f"{self} is not possible: expected at least one attempt and no negative delay"
            )

    def delay(self, failed: int) -> float:
        """Return how many seconds to wait after so many failed attempts."""
        whole: float = min(self.longest_delay, self.first_delay * 2 ** (failed - 1))
        return whole * _chance.uniform(0.5, 1.0)


class StoppedError(Exception):
    """Another part of the same work failed, so this one was given up."""


def passes(error: BaseException) -> bool:
    """Return whether an error of a store is one that may be gone at the next attempt."""
    seen: BaseException | None = error
    for _ in range(5):
        if seen is None:
            return False
        verdict = _verdict(seen)
        if verdict is not None:
            return verdict
        seen = seen.__cause__ or seen.__context__
    return False


def _verdict(error: BaseException) -> bool | None:
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _LASTING_CLASSES:
        return False
    if isinstance(error, (FileNotFoundError, PermissionError, FileExistsError)):
        return False
    if isinstance(error, (ConnectionError, TimeoutError, EOFError)) or names & _PASSING_CLASSES:
        return True
    # Some libraries say what happened only in the error beneath.
    for answer in (error, error.__cause__):
        status, code = _answer(answer)
        if status is not None:
            return status in _PASSING_STATUS or code in _PASSING_CODES
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING_NUMBERS
    return None


def _answer(error: BaseException | None) -> tuple[int | None, str]:
    """Return the HTTP status and the code of an answer, as far as an error carries them."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None, str(
            response.get("Error", {}).get("Code")
        )
    for name in ("status_code", "status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) and 400 <= value < 600:
            return value, ""
    return None, ""


def patiently(
    work: Callable[[], T], retries: Retries, doing: str, *, stop: Event | None = None
) -> T:
    """Return the result of `work`, which is tried again while its errors are of those that pass.

    Args:
        work: May be called several times, and must do the whole of it each time.
        retries: How often.
        doing: What it does and to what, as in "upload s3://bucket/run/CKPT+x/model.ckpt".
        stop: When this is set, no further attempt is made.

    Raises:
        RemoteError: The last attempt failed, or one failed for a reason that does not pass.
        FileNotFoundError: What it reads isn't there.
        StoppedError: `stop` was set.
    """
    started = time.monotonic()
    for attempt in range(1, retries.attempts + 1):
        if stop is not None and stop.is_set():
            raise StoppedError
        try:
            return work()
        except (SBCheckpointError, StoppedError, FileNotFoundError):
            raise
        except Exception as error:
            if not passes(error):
                raise RemoteError(_final(doing, error)) from clean(error)
            if attempt == retries.attempts:
                seconds = time.monotonic() - started
                raise RemoteError(_exhausted(doing, error, attempt, seconds)) from clean(error)
            delay = retries.delay(attempt)
            logger.info(
                f"can't {doing}: {said(error)}; attempt {attempt + 1} of {retries.attempts} in "
                f"{delay:.1f} s"
            )
        if stop is None:
            time.sleep(delay)
        else:
            stop.wait(delay)
    raise AssertionError("unreachable")


def said(error: BaseException) -> str:
    """Return an error in one line, with its kind."""
    text = " ".join(_hidden(str(error)).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def hide(options: Mapping[str, object]) -> None:
    """Have what opens a store left out of what is said from now on."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            hide(value)
        elif isinstance(value, (str, bytes)) and _SECRET.search(str(name)):
            text = value.decode(errors="replace") if isinstance(value, bytes) else value
            # Azure's are made of several parts.
            parts = [part.partition("=")[2] for part in text.split(";") if _SECRET.search(part)]
            _secrets.update(part for part in (text, *parts) if len(part) >= _SHORTEST)


def clean(error: BaseException) -> BaseException | None:
    """Return an error to chain to another, or None if it says a secret: tracebacks end in logs."""
    seen: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if seen is None:
            return error
        told = f"{seen} {seen.args!r}"
        if _hidden(told) != told:
            return None
        seen = seen.__cause__ or seen.__context__
    return None


def _hidden(text: str) -> str:
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "...")
    return without_secret(text) if "@" in text or "=" in text else text


def _final(doing: str, error: BaseException) -> str:
    if isinstance(error, PermissionError):
        advice = (
            "the store refuses it, and asking again would change nothing: check the credentials and "
            "what they may do there"
        )
    else:
        advice = "no error that passes by itself, so it was not tried again"
    return f"can't {doing}: {said(error)} ({advice})"


def _exhausted(doing: str, error: BaseException, attempts: int, seconds: float) -> str:
    times = "once" if attempts == 1 else f"{attempts} times in {seconds:.0f} s"
    return (
        f"can't {doing}: tried {times}, the last error was {said(error)}. Check that the store can "
        "be reached from this machine, and try again"
    )
