"""What comes from a store and goes to one: how far it is, in bytes, and as a bar where it takes long."""

from __future__ import annotations

import contextlib
import re
from contextlib import contextmanager

import pytest
from cli._terminal import terminals

from lightning_sbckpt._io.progress import listening
from lightning_sbckpt._remote import streams
from lightning_sbckpt._remote.folder import RemoteFolder
from lightning_sbckpt._remote.retries import Retries
from lightning_sbckpt._remote.streams import BLOCK
from lightning_sbckpt.verify import verify
from remote._local_checkpoint import local_checkpoint
from remote._machines import Machines, environment, filled
from remote._recorder import record
from remote._slow import SlowConnection

SIZE = 1000  # A model of 4 MB.
RATE = 7e5
# Many small blocks, as a file of gigabytes has many large ones.
SMALL_BLOCKS = """
import sys
from lightning_sbckpt._remote import streams
streams.BLOCK = 2**18
from lightning_sbckpt.cli import main
main(prog_name="lightning-sbckpt")
"""


@pytest.fixture
def bucket(s3_server, request):
    name = f"progress-{abs(hash(request.node.nodeid)) % 10**9}"
    s3_server.bucket(name)
    return name


@pytest.fixture
def machines(s3_server, bucket, tmp_path):
    return Machines(f"s3://{bucket}/run", s3_server.options, tmp_path)


@pytest.fixture
def run(machines, monkeypatch):
    """Two checkpoints in a store, sent in small blocks: the server has a checksum of each block."""
    monkeypatch.setattr(streams, "BLOCK", 2**18)
    with machines.another({"model": filled(1.0, SIZE)}) as checkpointer:
        for name, value in (("a", 1.0), ("b", 2.0)):
            checkpointer.recoverables = {"model": filled(value, SIZE)}
            checkpointer.save_checkpoint(name=name)
    return machines.url


class Heard:
    """What was announced, with its size and what was told of it."""

    def __init__(self):
        self.all = []

    @contextmanager
    def listen(self, what, total):
        told = []
        self.all.append((what, total, told))
        yield told.append

    def of(self, word):
        return [(what, total, sum(told)) for what, total, told in self.all if word in what]


@pytest.fixture
def heard():
    heard = Heard()
    with listening(heard.listen):
        yield heard


class TestTold:
    """What is told to whoever listens."""

    def test_all_that_is_brought_is_announced_with_its_size(self, run, machines, heard):
        """The small files of all checkpoints at the first look, the large ones when they are read."""
        there = machines.another(access="read")
        found = sorted(there.list_checkpoints(), key=lambda ckpt: ckpt.path.name)
        size = {name: len(data) for name, data in machines.objects().items()}
        small = sum(size[name] for name in size if "CKPT+" in name and name.endswith(".yaml"))
        assert heard.of("new in") == [(f"downloading what is new in {run}", small, small)]
        assert heard.of("listing")
        for ckpt in found:
            ckpt.open("model")
        assert heard.of("downloading CKPT") == [
            (f"downloading CKPT+{name}/model.ckpt", *[size[f"CKPT+{name}/model.ckpt"]] * 2)
            for name in "ab"
        ]

    def test_what_is_here_is_not_announced(self, run, machines, heard):
        """A second look brings nothing."""
        there = machines.another(access="read")
        for _ in range(2):
            for ckpt in there.list_checkpoints():
                ckpt.open("model")
        assert len(heard.of("downloading CKPT")) == 2
        assert len(heard.of("new in")) == 1

    def test_all_that_is_put_there_is_announced_with_its_size(self, machines, heard):
        """By name."""
        with machines.another({"model": filled(1.0, SIZE)}) as checkpointer:
            checkpointer.save_checkpoint(name="a")
        size = sum(
            len(data) for name, data in machines.objects().items() if name.startswith("CKPT+a/")
        )
        assert heard.of("uploading") == [("uploading CKPT+a", size, size)]

    def test_verify_tells_of_the_bytes_in_the_store(self, run, machines, heard):
        """As they are read, block by block, and of none of them twice."""
        told = []
        machines.another(access="read", local_dir=machines._folder / "mirror").list_checkpoints()
        found = verify(machines._folder / "mirror", on_progress=lambda *call: told.append(call))
        assert [one.status for one in found] == ["sound", "sound"]
        described = sum(one.bytes for one in found) - sum(
            len(data) for name, data in machines.objects().items() if name.endswith("MANIFEST.yaml")
        )
        assert told[-1] == (described, described)
        assert len(told) > 25
        assert heard.of("downloading CKPT") == []


def size_below(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class TestSent:
    """What the files of one checkpoint tell on their way."""

    @pytest.mark.sample(1)
    def test_a_large_file_is_told_in_blocks(self, folder, tmp_path):
        """On every kind of store; and back."""
        local = local_checkpoint(tmp_path / "local", large=3 * BLOCK + 7)
        sent, come, read = [], [], []
        folder.publish(local, "CKPT+a", progress=sent.append)
        size = size_below(local)
        assert sum(sent) == size
        assert max(sent) <= BLOCK
        folder.fetch("CKPT+a", "model.ckpt", tmp_path / "back", come.append)
        folder.digest("CKPT+a", "model.ckpt", read.append)
        assert come == read == [BLOCK, BLOCK, BLOCK, 7]

    def test_what_has_to_be_sent_again_is_taken_back(self, tmp_path, monkeypatch):
        """So that no more arrives than there is."""
        folder = RemoteFolder("memory://again/run", retries=Retries(3, first_delay=0.01))
        local = local_checkpoint(tmp_path / "local", large=3 * BLOCK)
        read, reads = streams._read, []

        def lose_the_connection_once(descriptor, start, count):
            reads.append(start)
            if reads.count(BLOCK) == 1 and start == BLOCK:
                raise ConnectionResetError("gone")
            return read(descriptor, start, count)

        monkeypatch.setattr(streams, "_read", lose_the_connection_once)
        self.publish_and_count(folder, local)

    def test_so_it_is_where_the_server_forgets_an_upload(self, machines, tmp_path):
        """The parts that had arrived are taken back together."""
        retries = Retries(3, first_delay=0.01)
        folder = RemoteFolder(machines.url, retries=retries, storage_options=machines.options)
        recorder, failed = record(folder), []

        def fail_once(number, operation, file):
            if operation == "complete_multipart_upload" and not failed:
                failed.append(operation)
                raise FileNotFoundError("there is no such upload")

        recorder.fail = fail_once
        self.publish_and_count(folder, local_checkpoint(tmp_path / "local", large=3 * BLOCK))
        assert failed

    def publish_and_count(self, folder, local):
        sent = []
        folder.publish(local, "CKPT+a", progress=sent.append)
        assert min(sent) < 0
        assert sum(sent) == size_below(local)


@pytest.fixture
def slow(s3_server, tmp_path):
    """Start the command in a terminal, on a machine that is slowly connected and has seen nothing."""
    with terminals() as start, contextlib.closing(SlowConnection(s3_server.port, RATE)) as way:
        variables = environment(s3_server, tmp_path / "cache")
        variables["FSSPEC_S3_ENDPOINT_URL"] = way.endpoint
        program = ("-c", SMALL_BLOCKS)
        yield lambda *args: start(*args, program=program, columns=160, **variables)


def shown(screen, word):
    """Return the figures that stood behind a word, each once."""
    screen.finish()
    return list(dict.fromkeys(re.findall(rf"{word} +[━╺╸]+ *([\d.,]+/[\d.,]+ \w+)", screen.text)))


class TestBars:
    """In a real terminal, by a slow connection to a real server."""

    @pytest.mark.sample(1)
    @pytest.mark.parametrize(
        ("command", "word"),
        [
            (["show", "{run}/CKPT+b", "--keys", "*"], r"downloading CKPT\+b/model.ckpt"),
            (["export", "{run}/CKPT+b", "{here}/out.pt"], r"downloading CKPT\+b/model.ckpt"),
            (["diff", "{run}/CKPT+a", "CKPT+b"], r"downloading CKPT\+a/model.ckpt"),
            (["average", "{run}", "--newest", "2"], r"downloading CKPT\+a/model.ckpt"),
            (["best", "{run}", "--sound"], "verifying"),
            (["verify", "{run}"], "verifying"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_what_is_downloaded_has_a_bar(self, command, word, run, slow, tmp_path):
        """It moves, and the command does what it always does."""
        screen = slow(*(part.format(run=run, here=tmp_path) for part in command))
        assert len(shown(screen, word)) > 1, screen.text
        assert screen.process.returncode == (1 if command[0] == "diff" else 0), screen.text
        assert "━" not in screen.raw.rpartition("\x1b[?25h")[2]

    @pytest.mark.long
    def test_what_is_uploaded_has_a_bar(self, run, slow):
        """The average of checkpoints in a store goes there, too."""
        screen = slow("average", run, "--newest", "2", "--name", "mean")
        assert shown(screen, r"uploading CKPT\+mean"), screen.text
        assert screen.process.returncode == 0
        assert screen.text.endswith(f"{run}/CKPT+mean\n")

    def test_with_json_there_is_none(self, run, slow, tmp_path):
        """Whatever is downloaded."""
        screen = slow("export", f"{run}/CKPT+b", tmp_path / "out.pt", "--json")
        assert screen.finish() == 0
        assert "━" not in screen.text

    def test_a_server_that_does_not_answer_is_said_while_it_is_waited_for(
        self, own_s3_server, tmp_path
    ):
        """What is waited for stands there, and goes away with the answer."""
        own_s3_server.bucket("bucket")
        url, options = "s3://bucket/run", own_s3_server.options
        with Machines(url, options, tmp_path).another({"model": filled(1.0)}) as checkpointer:
            checkpointer.save_checkpoint(name="a")
        own_s3_server.hold()
        with terminals() as start:
            screen = start("ls", url, columns=160, **environment(own_s3_server, tmp_path / "cache"))
            screen.read_until(lambda text: f"listing {url}" in text)
            own_s3_server.go_on()
            assert screen.finish() == 0
        assert "\r\na " in screen.raw.rpartition("\x1b[?25h")[2]
