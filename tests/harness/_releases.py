"""What a test needs of torch and of Lightning, which the package supports from 2.4 on.

A test whose subject an older release has not got is skipped there, and says why. A test that fails
with an older release for any other reason has found a fault.
"""

from __future__ import annotations

import re
from importlib.metadata import version as version_of

import pytest


def since(version: str, wanted: str) -> bool:
    """Return whether a version is at least the one that is wanted.

    The pre-releases and the local builds of a version count as that version.
    """
    return _numbers(version) >= _numbers(wanted)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    assert found, f"{version!r} is no version"
    return tuple(map(int, found[0].split(".")))


def needs_torch(wanted: str, feature: str) -> pytest.MarkDecorator:
    """Return a mark for a test of a feature that torch has from a release on."""
    return _needs("torch", wanted, feature)


def needs_lightning(wanted: str, feature: str) -> pytest.MarkDecorator:
    """Return a mark for a test of a feature that Lightning has from a release on."""
    return _needs("lightning", wanted, feature)


def _needs(library: str, wanted: str, feature: str) -> pytest.MarkDecorator:
    version = version_of(library)
    return pytest.mark.skipif(
        not since(version, wanted),
        reason=f"{feature} is in {library} from {wanted} on; this is {version}",
    )
