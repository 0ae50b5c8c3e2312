"""Checkpointers on one URL that share nothing else, as those on several machines."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import fsspec
import pytest
import torch
from _python import python

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._remote import places
from lightning_sbckpt._remote.folder import RemoteFolder
from lightning_sbckpt._remote.retries import Retries
from remote._server import Server

TESTS = Path(__file__).resolve().parents[1]


def filled(value: float, size: int = 400) -> torch.nn.Linear:
    """Return a model of one value, of about 600 kB."""
    model = torch.nn.Linear(size, size)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


class Machines:
    """Makes checkpointers on one URL, each with a folder of its own."""

    def __init__(self, url: str, options: dict[str, object], folder: Path) -> None:
        self.url = url
        self.options = options
        self._folder = folder
        self._numbers = itertools.count()

    def another(self, recoverables: dict[str, object] | None = None, **kwargs: object):
        """Return a checkpointer of a machine that has never seen the URL."""
        given = {"model": filled(0.0)} if recoverables is None else recoverables
        kwargs.setdefault("local_dir", self._folder / f"machine-{next(self._numbers)}")
        return Checkpointer(self.url, given, storage_options=self.options, **kwargs)

    def objects(self) -> dict[str, bytes]:
        """Return what is in the store, by name below the URL."""
        filesystem, root = fsspec.url_to_fs(self.url, **self.options)
        filesystem.invalidate_cache()
        start = root.strip("/") + "/"
        found = [name.strip("/").removeprefix(start) for name in filesystem.find(root)]
        return {name: filesystem.cat_file(f"{root}/{name}") for name in found}

    def put(self, name: str, data: bytes) -> None:
        """Change what is in the store, behind the back of everybody."""
        filesystem, root = fsspec.url_to_fs(self.url, **self.options)
        filesystem.pipe_file(f"{root}/{name}", data)

    def flip_a_byte(self, name: str) -> None:
        """Let the store lose a bit."""
        data = bytearray(self.objects()[name])
        data[len(data) // 2] ^= 1
        self.put(name, bytes(data))


def find_by_environment(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process find the server as a user's does, with a cache of its own."""
    import fsspec.config

    for name, value in {**server.environment, "XDG_CACHE_HOME": str(cache)}.items():
        monkeypatch.setenv(name, value)
    # fsspec has read the variables when it was imported.
    conf = {**fsspec.config.conf, **server.configured}
    monkeypatch.setattr(fsspec.config, "conf", conf)


def impatient(url: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a store that does not answer be given up soon."""
    soon = Retries(attempts=2, first_delay=0.05)
    made = lambda url, *, storage_options=None: RemoteFolder(  # noqa: E731
        url, retries=soon, storage_options=storage_options or options
    )
    monkeypatch.setattr(places, "RemoteFolder", made)
    places._remotes.pop(url, None)


def environment(server: Server, cache: Path) -> dict[str, str]:
    """Return the variables of a process that finds the server, with a cache of its own."""
    return {
        **os.environ,
        **server.environment,
        "XDG_CACHE_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }


def run_python(code: str, server: Server, cache: Path, *args: object, code_wanted: int = 0):
    """Run lines of Python in a process of their own, and return what they print."""
    done = python("-c", code, *map(str, args), env=environment(server, cache))
    assert done.returncode == code_wanted, done.stderr + done.stdout
    return done.stdout
