"""What a process remembers of how a URL is opened: what worked, and not what was wrong."""

from __future__ import annotations

import pytest

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._remote import places
from lightning_sbckpt.errors import RemoteError
from remote._machines import Machines, filled, find_by_environment

# The servers of the others ask for no secret.
pytestmark = pytest.mark.parametrize("server", ["s3", "sftp"], indirect=True)


@pytest.fixture
def machines(server, tmp_path, monkeypatch, request):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = f"options-{abs(hash(request.node.nodeid)) % 10**9}"
    server.bucket(bucket)
    return Machines(f"{server.url(bucket)}/run", server.options, tmp_path)


def wrong(options):
    """Return the options with another secret."""
    return {key: "wrong" if key in ("secret", "password") else options[key] for key in options}


def refused(machines):
    with pytest.raises(RemoteError):
        Checkpointer(machines.url, storage_options=wrong(machines.options))


def test_wrong_options_are_forgotten_when_none_are_given(machines, server, tmp_path, monkeypatch):
    """The environment says what is right; a typing error before it changes nothing."""
    refused(machines)
    find_by_environment(server, tmp_path / "cache", monkeypatch)
    assert Checkpointer(machines.url).list_checkpoints() == []


def test_wrong_options_do_not_take_the_place_of_those_that_work(machines):
    """A checkpointer that is in use goes on bringing its files."""
    machines.another({"model": filled(3.0)}).save_checkpoint(name="a")
    reader = Checkpointer(
        machines.url, {"model": filled(0.0)}, storage_options=machines.options, access="read"
    )
    (found,) = reader.list_checkpoints()
    refused(machines)
    reader.load_checkpoint(found)
    assert reader.recoverables["model"].bias[0] == 3.0
    reader.recoverables["model"] = filled(0.0)
    reader.load_checkpoint(f"{machines.url}/CKPT+a")
    assert reader.recoverables["model"].bias[0] == 3.0


def test_other_options_are_used_at_once(machines):
    """Right ones after wrong ones, and equal ones share what they have opened."""
    refused(machines)
    checkpointer = machines.another()
    assert checkpointer.list_checkpoints() == []
    (kept,) = places._remotes[machines.url]
    machines.another()
    assert places._remotes[machines.url] == [kept]
