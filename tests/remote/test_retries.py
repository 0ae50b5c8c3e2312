"""What is tried again, how often, and what is said."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import time
from threading import Event, Timer

import pytest

from lightning_sbckpt._remote.retries import Retries, StoppedError, passes, patiently
from lightning_sbckpt.errors import ConfigurationError, RemoteError

QUICK = Retries(attempts=3, first_delay=0.001)


class AnswerError(Exception):
    """As botocore's ClientError: the status is inside what the server said."""

    def __init__(self, status, code=""):
        super().__init__(code)
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}


class HttpError(Exception):
    """As gcsfs and azure have it."""

    def __init__(self, code):
        super().__init__(str(code))
        self.code = code


class EndpointConnectionError(Exception):
    """As botocore's."""


class ClientConnectorCertificateError(ConnectionError):
    """As aiohttp's."""


def wrapped(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        ConnectionResetError(),
        BrokenPipeError(),
        TimeoutError(),
        asyncio.TimeoutError(),
        OSError(errno.EHOSTUNREACH, "no route"),
        EndpointConnectionError(),
        AnswerError(500, "InternalError"),
        AnswerError(503, "SlowDown"),
        AnswerError(429),
        AnswerError(400, "RequestTimeout"),
        AnswerError(400, "BadDigest"),
        HttpError(502),
        wrapped(OSError("some text"), AnswerError(503)),
        wrapped(OSError(errno.EIO, "?"), AnswerError(502)),
        wrapped(RuntimeError("?"), ConnectionResetError()),
    ],
    ids=repr,
)
def test_what_passes_by_itself_is_tried_again(error):
    """Refused and lost connections, timeouts, a server that is busy or broken, lost bytes."""
    assert passes(error)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(),
        FileNotFoundError(),
        FileExistsError(),
        ValueError("wrong option"),
        TypeError(),
        OSError(errno.ENOSPC, "disk full"),
        AnswerError(403, "AccessDenied"),
        AnswerError(404, "NoSuchBucket"),
        AnswerError(400, "InvalidArgument"),
        HttpError(401),
        wrapped(PermissionError(), AnswerError(503)),
        wrapped(OSError(errno.EINVAL, "?"), AnswerError(400, "InvalidRequest")),
        ClientConnectorCertificateError(),
    ],
    ids=repr,
)
def test_what_lasts_is_not_tried_again(error):
    """Asking again would change nothing about a refusal, a wrong name, a wrong option."""
    assert not passes(error)


def failing(errors):
    left = list(errors)

    def work():
        if left:
            raise left.pop(0)
        return "done"

    return work


def test_it_goes_on_as_soon_as_an_attempt_succeeds(caplog):
    """Two failures of three attempts are said in the log, and nothing is raised."""
    caplog.set_level(logging.INFO, "lightning_sbckpt")
    work = failing([ConnectionResetError("reset by peer"), TimeoutError()])
    assert patiently(work, QUICK, "read s3://b/run/x") == "done"
    first, second = caplog.messages
    assert first.startswith(
        "can't read s3://b/run/x: ConnectionResetError: reset by peer; attempt 2"
    )
    assert "attempt 3 of 3" in second


def test_after_the_last_attempt_the_error_says_what_failed_how_often_and_what_to_do():
    """And the last error of the library is its cause."""
    with pytest.raises(RemoteError) as caught:
        patiently(failing([ConnectionResetError("a\nb")] * 5), QUICK, "upload s3://b/run/x")
    said = str(caught.value)
    assert said.startswith("can't upload s3://b/run/x: tried 3 times in 0 s, the last error was ")
    assert "ConnectionResetError: a b" in said
    assert "Check that the store can be reached" in said
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    assert isinstance(caught.value, OSError)


def test_a_refusal_is_raised_at_once_and_says_to_check_the_credentials(caplog):
    """One attempt, no wait."""
    caplog.set_level(logging.INFO, "lightning_sbckpt")
    with pytest.raises(RemoteError, match=r"can't list s3://b.*check the credentials"):
        patiently(failing([PermissionError("Access Denied")] * 5), QUICK, "list s3://b")
    assert caplog.messages == []


def test_what_is_not_there_is_said_as_it_is():
    """The caller knows whether that is an error."""
    with pytest.raises(FileNotFoundError):
        patiently(failing([FileNotFoundError("x")]), QUICK, "read x")


def test_waits_grow_up_to_the_longest_and_differ_by_chance():
    """Many processes that lost one server don't come back at one instant."""
    retries = Retries(attempts=9, first_delay=1.0, longest_delay=5.0)
    for failed, whole in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 5.0), (8, 5.0)):
        waits = {retries.delay(failed) for _ in range(50)}
        assert len(waits) > 40
        assert all(whole / 2 <= wait <= whole for wait in waits)


def test_the_default_waits_about_fifteen_seconds_in_all():
    """Long enough for a server to be started again, short enough for a job to end."""
    default = Retries()
    most = sum(min(default.longest_delay, default.first_delay * 2**n) for n in range(4))
    assert default.attempts == 5
    assert 15 <= most <= 25


def test_a_failure_elsewhere_ends_the_waiting():
    """Else a failed upload would wait for each of its parts."""
    stop = Event()
    Timer(0.1, stop.set).start()
    started = time.monotonic()
    with pytest.raises(StoppedError):
        patiently(failing([TimeoutError()] * 5), Retries(first_delay=20), "upload x", stop=stop)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"first_delay": -1}, {"longest_delay": -1}])
def test_an_impossible_number_of_retries_is_refused(wrong):
    """At construction, not at the first failure."""
    with pytest.raises(ConfigurationError, match="at least one attempt"):
        Retries(**wrong)


def test_waiting_draws_no_number_that_training_would():
    """Or a run whose server was away for a moment would go on with other data than one without."""
    before = random.getstate()
    assert len({Retries().delay(1) for _ in range(9)}) > 1
    assert random.getstate() == before
