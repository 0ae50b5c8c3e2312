"""What a folder says of a store is not followed; only a URL that the user named is."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import stat
import threading
import traceback

import fsspec
import pytest
from _python import python
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem

from lightning_sbckpt import Checkpointer, cli
from lightning_sbckpt._io.inside import NotRegularError, OpenFolder
from lightning_sbckpt._io.records import remote_files
from lightning_sbckpt._remote import mirror, registry, retries
from lightning_sbckpt._remote.folder import RemoteFolder
from lightning_sbckpt._remote.urls import normal_url
from lightning_sbckpt.errors import ConfigurationError, DamagedCheckpointError, RemoteError
from lightning_sbckpt.verify import verify
from remote._machines import Machines, filled


@pytest.fixture
def machines(tmp_path, request):
    """Machines that share a store in this process."""
    return Machines(f"memory://{request.node.name}/run", {}, tmp_path)


@pytest.fixture
def saved(machines, tmp_path):
    """A mirror on this machine, with one checkpoint that is in the store as well."""
    with machines.another({"model": filled(1.0)}, local_dir=tmp_path / "mirror") as checkpointer:
        checkpointer.save_checkpoint(name="a")
    return tmp_path / "mirror"


def note(folder, url):
    """Let a folder say that it is a mirror, as an earlier release noted it."""
    (folder / ".remote").mkdir(exist_ok=True)
    (folder / ".remote" / "REMOTE.yaml").write_text(f"url: {url}\n")


def forget():
    """Be another process, which was told nothing."""
    registry._told.clear()


class TestANoteInAFolder:
    """It came with the folder."""

    @pytest.fixture
    def downloaded(self, tmp_path):
        """A folder of checkpoints that somebody else has made."""
        folder = tmp_path / "downloaded"
        with Checkpointer(folder, {"model": filled(2.0)}) as checkpointer:
            for name in ("a", "b"):
                checkpointer.save_checkpoint(name=name)
        return folder

    @pytest.mark.parametrize("scheme", ["memory", "file"])
    def test_pruning_touches_no_store(self, machines, downloaded, tmp_path, scheme):
        """Neither a store nor another folder loses or gains anything."""
        victim = tmp_path / "victim"
        with Checkpointer(victim, {"model": filled(1.0)}) as checkpointer:
            checkpointer.save_checkpoint(name="a")
        machines.another({"model": filled(1.0)}).save_checkpoint(name="a")
        url = machines.url if scheme == "memory" else f"file://{victim}"
        note(downloaded, url)
        before = machines.objects(), sorted(victim.rglob("*"))
        args = ["prune", str(downloaded), "--num-to-keep", "1", "--all-runs", "--yes"]
        done = CliRunner().invoke(cli.main, args)
        assert done.exit_code == 0, done.output
        assert (machines.objects(), sorted(victim.rglob("*"))) == before
        assert len(list(downloaded.glob("CKPT*"))) == 1

    def test_no_host_in_it_is_called(self, downloaded, monkeypatch):
        """Whatever passwords are configured, nobody is sent them."""
        called = []
        with socket.create_server(("127.0.0.1", 0)) as server:

            def accept():
                while True:
                    try:
                        connection, _ = server.accept()
                    except OSError:
                        return
                    called.append(connection)
                    connection.close()

            thread = threading.Thread(target=accept, daemon=True)
            thread.start()
            note(downloaded, f"ftp://127.0.0.1:{server.getsockname()[1]}/x")
            monkeypatch.setenv("FSSPEC_FTP_PASSWORD", "hunter2")
            checkpointer = Checkpointer(downloaded, {"model": filled(0.0)}, access="read")
            assert checkpointer.url is None
            assert len(checkpointer.list_checkpoints()) == 2
            checkpointer.recover_if_possible()
            verify(downloaded)
            for args in (["ls"], ["show"], ["best"], ["verify"]):
                which = f"{downloaded}/CKPT+a" if args == ["show"] else str(downloaded)
                CliRunner().invoke(cli.main, [*args, which])
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
        assert called == []

    def test_a_record_of_files_elsewhere_brings_nothing(self, machines, downloaded, saved):
        """It says truly which CKPT.yaml it is of, and where the rest is; nobody asks there."""
        note(downloaded, machines.url)
        folder = downloaded / "CKPT+a"
        (folder / "model.ckpt").unlink()
        found = (folder / "CKPT.yaml").stat()
        record = {"of": [found.st_ino, found.st_mtime_ns], "files": {"model.ckpt": [641_000, ""]}}
        (downloaded / ".remote" / "CKPT+a.json").write_text(json.dumps(record))
        with pytest.raises(DamagedCheckpointError, match=r"model\.ckpt is missing"):
            Checkpointer(downloaded, {"model": filled(0.0)}).load_checkpoint(folder)
        assert not (folder / "model.ckpt").exists()

    def test_a_record_removes_no_file_that_can_not_be_brought(self, machines, downloaded):
        """A damaged file is removed only where a sound one comes instead."""
        folder = downloaded / "CKPT+a"
        found = (folder / "CKPT.yaml").stat()
        record = {"of": [found.st_ino, found.st_mtime_ns], "files": {"model.ckpt": [641_000, ""]}}
        (downloaded / ".remote").mkdir()
        (downloaded / ".remote" / "CKPT+a.json").write_text(json.dumps(record))
        (folder / "model.ckpt").write_bytes(b"damaged")
        assert verify(folder)[0].status == "damaged"
        with pytest.raises(DamagedCheckpointError):
            Checkpointer(downloaded, {"model": filled(0.0)}).load_checkpoint(folder)
        assert (folder / "model.ckpt").read_bytes() == b"damaged"

    def test_it_is_said_once_that_it_is_not_followed(self, machines, downloaded, caplog):
        """Who has a copy of her own learns what to do; whatever stands there is in one short line."""
        note(downloaded, json.dumps("s3://b/" + "x" * 5000 + "\n\x1b[31m"))
        for _ in range(2):
            Checkpointer(downloaded).list_checkpoints()
        [line] = [each.getMessage() for each in caplog.records]
        assert "name that URL, with local_dir=" in line
        assert line.isprintable() and len(line) < 800


class TestTheRegistry:
    """A mirror is one because its owner keeps it as one."""

    def test_a_path_of_a_mirror_is_known_to_other_processes(self, machines, saved):
        """Its URL was named on this machine before."""
        forget()
        assert Checkpointer(saved).url == machines.url

    def test_a_link_to_it_is_it(self, machines, saved, tmp_path):
        """It is known by the folder, not by the way there."""
        (tmp_path / "link").symlink_to(saved)
        assert Checkpointer(tmp_path / "link").url == machines.url

    @pytest.mark.parametrize("same_process", [True, False])
    def test_a_copy_is_an_ordinary_folder(self, machines, saved, tmp_path, same_process):
        """To prune a backup leaves the store alone."""
        shutil.copytree(saved, tmp_path / "backup")
        if not same_process:
            forget()
        before = machines.objects()
        with Checkpointer(tmp_path / "backup") as checkpointer:
            assert checkpointer.url is None
            checkpointer.delete_checkpoints(num_to_keep=0)
            assert checkpointer.list_checkpoints() == []
        assert machines.objects() == before

    @pytest.mark.parametrize("same_process", [True, False])
    def test_another_folder_in_its_place_is_an_ordinary_one(
        self, machines, saved, tmp_path, same_process, monkeypatch
    ):
        """Filesystems give the number of a removed folder to the next one."""
        shutil.rmtree(saved)
        with Checkpointer(tmp_path / "another", {"model": filled(2.0)}) as checkpointer:
            checkpointer.save_checkpoint(name="b")
        url = machines.url if not same_process else f"{machines.url}-of-somebody-else"
        note(tmp_path / "another", url)
        (tmp_path / "another").rename(saved)
        if not same_process:
            forget()
        # As if it had the number, too.
        names = [path.name for path in (tmp_path / "cache/lightning-sbckpt/mirrors").iterdir()]
        monkeypatch.setattr(registry, "_entry_name", lambda _: names[0])
        assert Checkpointer(saved).url is None

    def test_one_that_was_moved_is_known_again_when_the_url_is_named(self, machines, saved):
        """Until then it is a folder like others."""
        moved = saved.rename(saved.with_name("moved"))
        forget()
        assert Checkpointer(moved).url is None
        assert machines.another(local_dir=moved).url == machines.url
        forget()
        assert Checkpointer(moved).url == machines.url

    def test_one_of_an_earlier_release_is_known_when_the_url_is_named(
        self, machines, saved, tmp_path
    ):
        """It has a note without a word, and stands in no registry."""
        shutil.rmtree(tmp_path / "cache")
        note(saved, machines.url)
        forget()
        assert Checkpointer(saved).url is None
        again = machines.another(local_dir=saved)
        assert [ckpt.path.name for ckpt in again.list_checkpoints()] == ["CKPT+a"]
        forget()
        assert Checkpointer(saved).url == machines.url

    def test_a_folder_with_checkpoints_of_its_own_holds_no_copies(self, machines, saved, tmp_path):
        """Nor does one that says it is of another URL."""
        with Checkpointer(tmp_path / "own", {"model": filled(2.0)}) as checkpointer:
            checkpointer.save_checkpoint()
        note(tmp_path / "own", "memory://somewhere/else")
        with pytest.raises(ConfigurationError, match="there are checkpoints in it already"):
            machines.another(local_dir=tmp_path / "own")

    def test_without_a_cache_the_process_that_named_the_url_knows(
        self, machines, tmp_path, monkeypatch
    ):
        """A home that can't be written is no reason to fail."""
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with machines.another({"model": filled(1.0)}, local_dir=tmp_path / "here") as checkpointer:
            checkpointer.save_checkpoint(name="a")
        model = filled(0.0)
        again = machines.another({"model": model}, local_dir=tmp_path / "there")
        assert again.recover_if_possible()
        assert float(model.bias[0].detach()) == 1.0
        assert Checkpointer(tmp_path / "there").url == machines.url

    @pytest.mark.parametrize("mode", [0o777, 0o770])
    def test_a_registry_that_others_may_write_is_not_read(self, saved, tmp_path, mode):
        """They could have put URLs there."""
        (tmp_path / "cache/lightning-sbckpt/mirrors").chmod(mode)
        forget()
        assert Checkpointer(saved).url is None

    @pytest.mark.parametrize(
        "entry", ["", "[]", "{}", '{"url": 1}', '{"url": "s3://x", "word": null}', "[" * 9999]
    )
    def test_an_entry_that_is_none_is_passed_over(self, saved, tmp_path, entry):
        """The cache may be damaged."""
        for path in (tmp_path / "cache/lightning-sbckpt/mirrors").iterdir():
            path.write_text(entry)
        forget()
        assert Checkpointer(saved).url is None


class TestPrivacy:
    """What comes from a store is for those who have its credentials."""

    @pytest.mark.parametrize("where", ["default", "local_dir"])
    def test_nobody_else_can_look_into_a_mirror(self, machines, tmp_path, where):
        """Whatever the umask is."""
        model = filled(1.0)
        machines.another({"model": model}).save_checkpoint(name="a")
        before = os.umask(0)
        try:
            options = {"local_dir": tmp_path / "made" / "mirror"} if where == "local_dir" else {}
            with Checkpointer(machines.url, {"model": model}, **options) as checkpointer:
                checkpointer.recover_if_possible()
                root = checkpointer.checkpoints_dir
        finally:
            os.umask(before)
        cache = tmp_path / "cache" / "lightning-sbckpt"
        assert not (root / "CKPT+a").is_symlink()
        for folder in (root, root / ".remote", cache, cache / "mirrors"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
        for file in (root / "CKPT+a" / "model.ckpt", *(cache / "mirrors").iterdir()):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file

    def test_what_is_in_a_folder_that_the_user_made_is_private_too(self, machines, tmp_path):
        """Its own mode is hers; each checkpoint in it has that of a mirror."""
        (tmp_path / "mine").mkdir(mode=0o755)
        before = os.umask(0)
        try:
            with machines.another({"model": filled(1.0)}, local_dir=tmp_path / "mine") as mine:
                mine.save_checkpoint(name="a")
            machines.another({"model": filled(1.0)}).save_checkpoint(name="b")
            machines.another(local_dir=tmp_path / "mine", access="read").list_checkpoints()
        finally:
            os.umask(before)
        for name in ("CKPT+a", "CKPT+b", ".remote"):
            assert stat.S_IMODE((tmp_path / "mine" / name).stat().st_mode) == 0o700, name
        history = tmp_path / "mine" / "HISTORY.jsonl"
        assert stat.S_IMODE(history.stat().st_mode) == 0o600

    def test_a_run_folder_keeps_the_umask(self, tmp_path):
        """A group may share it."""
        before = os.umask(0o002)
        try:
            with Checkpointer(tmp_path / "run", {"model": filled(1.0)}) as checkpointer:
                folder = checkpointer.save_checkpoint().path
        finally:
            os.umask(before)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o775
        assert stat.S_IMODE((folder / "model.ckpt").stat().st_mode) == 0o664


SECRET = "hunter2/and+more="


class TestSecrets:
    """What opens a store is shown nowhere."""

    @pytest.mark.parametrize(
        "url",
        [
            f"s3://KEY:{SECRET}@bucket/run",
            f"s3:/KEY:{SECRET}@bucket/run",
            f"sftp://user:{SECRET}@host:22/run",
            f"sftp://user:a:b@{SECRET}@host/run",
            f"sftp://:{SECRET}@host/run",
            f"S3://KEY:{SECRET}@bucket/run/CKPT+a",
            f"https://host/run?v=1&token={SECRET}",
            f"abfs://c@account.dfs.core.windows.net/run?sv=1&sig={SECRET}",
            f"simplecache::s3://KEY:{SECRET}@bucket/run",
            f"nope://KEY:{SECRET}@bucket/run",
        ],
    )
    def test_a_url_with_one_is_refused_without_it(self, url, tmp_path, caplog):
        """By all that take a URL, before anything is made or asked."""
        caplog.set_level(logging.DEBUG)
        from lightning_sbckpt import SBCheckpoint
        from lightning_sbckpt.export import to_state_dict

        for use in (
            lambda: Checkpointer(url),
            lambda: SBCheckpoint(url),
            lambda: verify(url),
            lambda: to_state_dict(url, tmp_path / "out"),
            lambda: Checkpointer(tmp_path / "run").load_checkpoint(url),
        ):
            with pytest.raises(ConfigurationError) as caught:
                use()
            assert_not_told(caught.value)
        done = CliRunner().invoke(cli.main, ["ls", url])
        assert done.exit_code != 0 and "hunter2" not in done.output
        assert "hunter2" not in caplog.text
        assert not (tmp_path / "cache" / "lightning-sbckpt").exists()

    @pytest.mark.parametrize(
        "url",
        [
            "s3://bucket/a:b@c",
            "s3://bucket/what?x=1",
            "sftp://user@host:22/run@2",
            "sftp://user@[::1]:22/run@2",
            "abfs://container@account.dfs.core.windows.net/run",
        ],
    )
    def test_a_url_without_one_is_as_it_was(self, url):
        """Users, ports and all that a key may hold."""
        assert normal_url(url) == url

    @pytest.mark.parametrize(
        "options",
        [
            {"key": "AKIAKEY", "secret": SECRET},
            {"token": SECRET},
            {"client_kwargs": {"aws_secret_access_key": SECRET}},
            {"password": SECRET},
            {"connection_string": f"AccountName=name;AccountKey={SECRET};Suffix=x"},
            {"sas_token": SECRET.encode()},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_what_a_library_says_of_one_is_left_out(self, options, machines, monkeypatch, caplog):
        """In our own errors, those chained to them, and the log."""
        caplog.set_level(logging.DEBUG, logger="lightning_sbckpt")
        monkeypatch.setattr(retries, "_secrets", set())
        folder = RemoteFolder(
            machines.url, storage_options=options, retries=retries.Retries(2, 0.0)
        )

        def fail(*_, **__):
            try:
                raise ValueError(f"wrong: {SECRET}")
            except ValueError as error:
                raise ConnectionError(f"refused {options!r} and {SECRET}") from error

        for method in ("ls", "find", "cat_file", "pipe_file", "info"):
            monkeypatch.setattr(MemoryFileSystem, method, fail)
        for use in (
            folder.check,
            folder.listing,
            lambda: folder.read("CKPT+a", "CKPT.yaml"),
            lambda: folder.write("CKPT+a", "x", b""),
        ):
            with pytest.raises(RemoteError, match="refused") as caught:
                use()
            assert_not_told(caught.value)
        assert "refused" in caplog.text and "hunter2" not in caplog.text
        assert "hunter2" not in repr(folder)

    def test_no_file_holds_one(self, machines, tmp_path):
        """Neither the registry, nor the mirror, nor what is saved."""
        options = {"secret": SECRET, "use_listings_cache": False}
        with Checkpointer(
            machines.url,
            {"model": filled(1.0)},
            storage_options=options,
            local_dir=tmp_path / "mirror",
        ) as checkpointer:
            checkpointer.save_checkpoint(name="a")
            assert "hunter2" not in repr(checkpointer)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(files) > 5
        for path in files:
            assert b"hunter2" not in path.read_bytes(), path


def assert_not_told(error):
    """Check what a traceback of an error shows, chained ones too."""
    assert "hunter2" not in "".join(traceback.format_exception(error))


class TestBringingFollowsNoLink:
    """A mirror that others may write to can hold links."""

    @pytest.fixture
    def reading(self, machines, saved, tmp_path):
        """A mirror that has only the small files yet, and a folder that is none of its business."""

        def write(_, path):
            path.mkdir()
            (path / "usercustomize.py").write_text("print('any code')\n")

        with machines.another() as checkpointer:
            checkpointer.add_recoverable("extra", object(), custom_save_hook=write)
            checkpointer.save_checkpoint(name="b")
        reader = machines.another(local_dir=tmp_path / "reading")
        reader.list_checkpoints()
        (tmp_path / "outside").mkdir()
        return tmp_path / "reading" / "CKPT+b"

    def test_not_in_place_of_a_folder(self, machines, reading, tmp_path):
        """The files in it would be written wherever it leads."""
        (reading / "extra.ckpt").symlink_to(tmp_path / "outside")
        assert "extra.ckpt/usercustomize.py" in remote_files(reading)
        reader = machines.another(local_dir=reading.parent)
        with pytest.raises(
            DamagedCheckpointError, match="it is a symbolic link, expected a folder"
        ):
            reader.load_checkpoint(reading)
        reader._mirror.fetch(reading, ["extra.ckpt/usercustomize.py"])
        assert os.listdir(tmp_path / "outside") == []

    def test_not_in_place_of_a_file(self, machines, reading, tmp_path):
        """One that leads nowhere would be made there."""
        target = tmp_path / "outside" / "made"
        for name in ("model.ckpt", "model.ckpt.part"):
            (reading / name).symlink_to(target)
        machines.another(local_dir=reading.parent).load_checkpoint(reading)
        assert (reading / "model.ckpt").is_file() and not (reading / "model.ckpt").is_symlink()
        assert os.listdir(tmp_path / "outside") == []

    def test_not_in_place_of_the_checkpoint(self, machines, reading, tmp_path):
        """It may be swapped while a file is on its way."""
        reading.rename(tmp_path / "outside" / "real")
        reading.symlink_to(tmp_path / "outside" / "real")
        machines.another(local_dir=reading.parent)._mirror.fetch(reading, ["model.ckpt"])
        assert not (tmp_path / "outside" / "real" / "model.ckpt").exists()


def test_a_name_stays_inside_an_open_folder(tmp_path):
    """Whoever gives it."""
    (tmp_path / "inner").mkdir()
    with OpenFolder(tmp_path / "inner") as folder:
        for name in ("..", "a/../b", "/etc", "a//b", "./a"):
            with pytest.raises(NotRegularError, match="leads out"):
                folder.below(name)


def test_a_mirror_is_used_by_path_in_a_process_of_its_own(saved, machines):
    """The command that is given a path works on the store behind it."""
    code = "import sys; from lightning_sbckpt import Checkpointer; print(Checkpointer(sys.argv[1]).url)"
    assert python("-c", code, str(saved)).stdout.strip() == machines.url


class TestNamesInAStore:
    """There a name is only text, of any kind and of up to 1,024 bytes."""

    HEALTHY = b"unixtime: 1.0\nend-of-epoch: true\n"

    @pytest.mark.parametrize(
        "name",
        [
            f"CKPT+{'x' * 400}/CKPT.yaml",
            f"CKPT+{'ü' * 110}/CKPT.yaml",
            f"CKPT+good/{'y' * 300}.yaml",
            "CKPT+good/CKPT.yaml/x",
            "CKPT+a\nb/CKPT.yaml",
            "CKPT+\x1b[31m/CKPT.yaml",
            "CKPT+good/a\x9bb",
            "CKPT+\ud800/CKPT.yaml",
            "CKPT+good/back\\slash",
            "CKPT+good/" + "/".join("d" * 150),
        ],
        ids=[
            "long",
            "bytes",
            "file",
            "under",
            "line",
            "escape",
            "c1",
            "half",
            "back",
            "deep",
        ],
    )
    def test_one_that_can_not_be_here_hides_no_other(self, machines, name, caplog):
        """It is left out, and said once; what is beside it is listed and loaded."""
        machines.another({"model": filled(1.0)}).save_checkpoint(name="good")
        machines.put("put", self.HEALTHY)
        # Memory refuses some of what S3 takes, if it is asked.
        store = fsspec.filesystem("memory").store
        start = "/" + machines.url.partition("://")[2]
        store[f"{start}/{name}"] = store.pop(f"{start}/put")
        model = filled(0.0)
        reader = machines.another({"model": model}, access="read")
        for _ in range(2):
            assert [ckpt.path.name for ckpt in reader.list_checkpoints()] == ["CKPT+good"]
        assert reader.recover_if_possible().path.name == "CKPT+good"
        assert float(model.bias[0].detach()) == 1.0
        said = [record for record in caplog.records if "left out" in record.getMessage()]
        assert len(said) == 1
        assert said[0].getMessage().isprintable() and len(said[0].getMessage()) < 400

    def test_where_case_does_not_count_one_of_two_is_here(self, machines, monkeypatch, caplog):
        """As on the disks of many laptops."""
        machines.another({"model": filled(1.0)}).save_checkpoint(name="a")
        machines.another({"model": filled(1.0)}).save_checkpoint(name="A")
        machines.put("CKPT+a/NOTE.txt", b"x")
        machines.put("CKPT+a/note.txt", b"y")
        assert len(machines.another(access="read").list_checkpoints()) == 2
        monkeypatch.setattr(mirror.Mirror, "_tells_case", lambda _: False)
        reader = machines.another(access="read")
        assert len(reader.list_checkpoints()) == 1
        assert "'CKPT+A' has the same name here, but for its case" in caplog.text

    @pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL])
    def test_a_name_that_this_disk_does_not_take_hides_no_other(
        self, machines, number, monkeypatch, caplog
    ):
        """Some take less than others."""
        for name in ("good", "refused"):
            machines.another({"model": filled(1.0)}).save_checkpoint(name=name)
        real = mirror.publish

        def refuse(staged, folder, *args, **kwargs):
            if folder.name == "CKPT+refused":
                raise OSError(number, os.strerror(number))
            return real(staged, folder, *args, **kwargs)

        monkeypatch.setattr(mirror, "publish", refuse)
        reader = machines.another(access="read")
        assert [ckpt.path.name for ckpt in reader.list_checkpoints()] == ["CKPT+good"]
        assert os.strerror(number) in caplog.text

    def test_a_disk_that_fails_is_an_error_of_the_store(self, machines, monkeypatch):
        """It says what to do; no bare error of the system."""
        machines.another({"model": filled(1.0)}).save_checkpoint(name="good")

        def fail(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(mirror, "publish", fail)
        with pytest.raises(RemoteError, match=r"can.t be brought to .*: No space left on device"):
            machines.another(access="read").list_checkpoints()
