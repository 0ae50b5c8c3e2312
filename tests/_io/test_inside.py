"""What lies below a run folder is reached through open folders: a link that comes in between leads nowhere."""

from __future__ import annotations

import ast
import contextlib
import os
import socket
import stat
from pathlib import Path

import pytest
import torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io.inside import MOST_FOLDERS, NotRegularError, OpenFolder, open_parent
from lightning_sbckpt._io.open_regular import open_below, open_regular, open_to_read, read_regular
from lightning_sbckpt._io.storage import LocalStorage, digest
from lightning_sbckpt._layout.copies import copy_paramfile
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt.errors import SaveError, SBCheckpointError

PACKAGE = Path(__file__).resolve().parents[2] / "lightning_sbckpt"


class Swapping(LocalStorage):
    """A disk on which, just before the n-th operation, a folder is swapped for a link."""

    def __init__(self, outside, at):
        self.outside = outside
        self.at = at
        self.count = 0
        self.swapped = None

    def before(self, operation, path, target=None):
        self.count += 1
        if self.count != self.at:
            return
        folder = path if path.is_dir() and not path.is_symlink() else path.parent
        # One of ours: the run folder itself is the user's.
        if folder.name.startswith(("CKPT", ".")) or folder.parent.name.startswith(("CKPT", ".")):
            self.swapped = operation, folder
            folder.rename(folder.parent / "taken away")
            folder.symlink_to(self.outside)


@pytest.fixture
def outside(tmp_path, tree_bytes):
    """A folder elsewhere with the names that ours have, which stays as it is."""
    folder = tmp_path / "outside"
    (folder / "inner").mkdir(parents=True)
    for name in ("model.ckpt", "CKPT.yaml", "MANIFEST.yaml", "ANNOTATIONS.yaml", "inner/deep"):
        (folder / name).write_text("mine")
    before = tree_bytes(folder)
    yield folder
    assert tree_bytes(folder) == before


def deep(_, path):
    """Write a folder with a folder in it."""
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "deep").write_text("x")
    (path / "flat").write_text("y")


def checkpointer_of(root, **arguments):
    """Return a checkpointer of a module and of something that a hook writes into folders."""
    made = Checkpointer(root, {"model": torch.nn.Linear(2, 2)}, **arguments)
    made.add_recoverable("extra", object(), custom_save_hook=deep)
    return made


class TestALinkThatComesInBetween:
    """At each operation in turn, the folder that it is about becomes a link."""

    @pytest.mark.parametrize("at", range(1, 40))
    def test_nothing_is_written_behind_it_in_a_save(self, tmp_path, outside, at):
        """One that is put there when all was written is found, as one that is put there later."""
        storage = Swapping(outside, at)
        try:
            checkpointer_of(tmp_path / "run", storage=storage).save_checkpoint(name="a")
        except (SBCheckpointError, OSError):
            return
        for ckpt in Checkpointer(tmp_path / "run").list_checkpoints():
            assert all("symbolic link" in problem for problem in find_damage(ckpt.path))

    @pytest.mark.parametrize("at", range(1, 9))
    def test_nothing_is_removed_behind_it(self, tmp_path, outside, at):
        """The folders in the checkpoint, and itself."""
        with checkpointer_of(tmp_path / "run") as checkpointer:
            ckpt = checkpointer.save_checkpoint(name="a")
        gone = ckpt.path.rename(ckpt.path.with_name(".removed+x"))
        storage = Swapping(outside, at)
        with contextlib.suppress(OSError):  # What the enemy put into it may be left.
            storage.remove_tree(gone)
        assert storage.count >= at

    @pytest.mark.parametrize("at", range(1, 7))
    def test_nothing_is_annotated_behind_it(self, tmp_path, outside, at):
        """The new file and the old one."""
        with checkpointer_of(tmp_path / "run") as checkpointer:
            ckpt = checkpointer.save_checkpoint(name="a")
        storage = Swapping(outside, at)
        with checkpointer_of(tmp_path / "run", storage=storage) as checkpointer:
            try:
                checkpointer.annotate(ckpt, {"score": 1.0})
            except (SBCheckpointError, OSError):
                assert storage.swapped

    def test_the_campaign_swaps_at_every_kind_of_operation(self, tmp_path, outside):
        """Otherwise it would show nothing."""
        kinds = set()
        for at in range(1, 40):
            storage = Swapping(outside, at)
            with contextlib.suppress(SBCheckpointError, OSError):
                checkpointer_of(tmp_path / f"{at}", storage=storage).save_checkpoint(name="a")
            kinds.add(storage.swapped and storage.swapped[0])
        assert {"create", "write", "flush_file", "flush_dir", "rename"} <= kinds


class TestReading:
    """A link that leads to what could be read."""

    @pytest.fixture
    def saved(self, tmp_path):
        """A checkpoint."""
        with checkpointer_of(tmp_path / "run") as checkpointer:
            return checkpointer.save_checkpoint(name="a").path

    def test_not_in_place_of_the_checkpoint(self, saved, outside):
        """It was looked at before."""
        saved.rename(saved.with_name("real"))
        saved.symlink_to(outside)
        for read in (
            lambda: open_regular(saved / "CKPT.yaml"),
            lambda: open_to_read(saved / "model.ckpt"),
            lambda: open_below(saved, "extra.ckpt/flat"),
            lambda: read_regular(saved / "CKPT.yaml", 100),
            lambda: digest(saved / "model.ckpt"),
        ):
            with pytest.raises(NotRegularError, match="it is a symbolic link, expected a folder"):
                read()

    def test_not_in_place_of_a_folder_in_it(self, saved, outside):
        """Of one that a hook has made, or of the pieces of a state."""
        (saved / "extra.ckpt").rename(saved.parent / "away")
        (saved / "extra.ckpt").symlink_to(outside)
        for read in (
            lambda: open_regular(saved / "extra.ckpt" / "model.ckpt"),
            lambda: open_to_read(saved / "extra.ckpt" / "model.ckpt"),
            lambda: open_below(saved, "extra.ckpt/inner/deep"),
            lambda: open_parent(saved / "extra.ckpt" / "model.ckpt"),
        ):
            with pytest.raises(NotRegularError, match="it is a symbolic link, expected a folder"):
                read()
        assert any("symbolic link" in problem for problem in find_damage(saved))

    def test_not_when_a_paramfile_is_copied(self, saved, outside, tmp_path):
        """As an average and a consolidation do; a folder as well as what is in it."""
        (saved / "extra.ckpt" / "inner" / "link").symlink_to(outside)
        with pytest.raises(NotRegularError, match="it is a symbolic link"):
            copy_paramfile(saved / "extra.ckpt", tmp_path / "copied")
        (saved / "model.ckpt").unlink()
        (saved / "model.ckpt").symlink_to(outside / "model.ckpt")
        with pytest.raises(NotRegularError, match="it is a symbolic link"):
            copy_paramfile(saved / "model.ckpt", tmp_path / "file")
        assert not (tmp_path / "file").exists()


class TestTheUsersOwnPath:
    """What is above the run folder, and itself, may be links."""

    @pytest.mark.parametrize("name", ["run", "CKPT", "CKPT+mine", ".removed+mine"])
    def test_a_run_folder_that_is_a_link(self, tmp_path, name):
        """As /scratch often is; whatever it is called."""
        (tmp_path / "disk").mkdir()
        (tmp_path / name).symlink_to(tmp_path / "disk")
        with checkpointer_of(tmp_path / name) as checkpointer:
            checkpointer.save_checkpoint(name="a")
            ckpt = checkpointer.save_checkpoint(name="a")
            checkpointer.annotate(ckpt, {"score": 1.0})
            checkpointer.save_and_keep_only(num_to_keep=1)
        with checkpointer_of(tmp_path / name) as again:
            again.custom_load_hooks["extra"] = lambda obj, path, end_of_epoch: None
            assert again.recover_if_possible()
            assert len(again.list_checkpoints()) == 1
        from lightning_sbckpt._layout.history import read_history

        assert len(read_history(tmp_path / name)) > 2

    def test_a_file_that_the_user_names_may_be_a_link(self, tmp_path):
        """It is hers; as those that a hub keeps."""
        torch.save({"weight": torch.ones(1)}, tmp_path / "file")
        (tmp_path / "link.ckpt").symlink_to(tmp_path / "file")
        with open_to_read(tmp_path / "link.ckpt") as stream:
            assert stream.read(2) == b"PK"


class TestWhatAHookLeaves:
    """Only files and folders can be kept in a checkpoint."""

    @pytest.mark.parametrize("where", ["as the file", "in a folder"])
    @pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a symbolic link"])
    def test_anything_else_is_a_save_error_at_once(self, tmp_path, kind, where, monkeypatch):
        """A pipe would be waited on for ever."""

        def hook(_, path):
            if where == "in a folder":
                path.mkdir()
                path = path / "left"
            if kind == "a named pipe":
                os.mkfifo(path)
            elif kind == "a symbolic link":
                path.symlink_to("/etc/hostname")
            else:
                # The path of a socket may have 107 bytes.
                monkeypatch.chdir(path.parent)
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(path.name)

        checkpointer = Checkpointer(tmp_path / "run")
        checkpointer.add_recoverable("extra", object(), custom_save_hook=hook)
        with pytest.raises(SaveError, match=f"it is {kind}, expected a regular file"):
            checkpointer.save_checkpoint()
        assert checkpointer.list_checkpoints() == []
        checkpointer.close()

    def test_more_folders_in_each_other_than_can_be_open_are_refused(self, tmp_path):
        """By a save and by a removal, in words."""

        def hook(_, path):
            path.mkdir()
            descriptor = os.open(path, os.O_RDONLY)
            for _ in range(MOST_FOLDERS + 5):
                os.mkdir("d", dir_fd=descriptor)
                inner = os.open("d", os.O_RDONLY, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
            os.close(descriptor)

        checkpointer = Checkpointer(tmp_path / "run")
        checkpointer.add_recoverable("extra", object(), custom_save_hook=hook)
        with pytest.raises(SaveError, match=f"more than {MOST_FOLDERS} folders are in each other"):
            checkpointer.save_checkpoint()
        checkpointer.close()


class TestOpenFolder:
    """The one way."""

    def test_a_device_is_no_file(self):
        """To read it would never end."""
        with OpenFolder("/dev") as folder, pytest.raises(NotRegularError, match="a device"):
            folder.open("null", os.O_RDONLY)

    def test_a_folder_that_may_be_passed_and_not_listed(self, tmp_path):
        """The user's own may be such."""
        (tmp_path / "a").write_text("x")
        with OpenFolder(tmp_path, follow=True) as folder:
            assert stat.S_ISREG(folder.lstat("a").st_mode)
            assert dict(folder.entries()) == {"a": False}

    def test_nothing_stays_open(self, tmp_path):
        """Neither after an error nor otherwise."""
        (tmp_path / "CKPT+a" / "b").mkdir(parents=True)
        (tmp_path / "CKPT+a" / "b" / "link").symlink_to("/")
        before = len(os.listdir("/proc/self/fd"))
        for name in ("b/link", "b/none", "b", "b/c"):
            try:
                with OpenFolder(tmp_path / "CKPT+a") as folder, folder.below(name, make=True):
                    pass
            except OSError:
                pass
        with OpenFolder(tmp_path / "CKPT+a") as folder:
            assert [name for name, _ in folder.files()] == ["b/link"]
        assert len(os.listdir("/proc/self/fd")) <= before


# ---------------------------------------------------------------------- no other way

OF_OS = {
    *("open", "unlink", "remove", "rename", "replace", "rmdir", "mkdir", "makedirs", "link"),
    *("symlink", "truncate", "utime", "chmod", "chown", "mkfifo", "removedirs", "renames"),
}
OF_PATHS = {
    *("open", "unlink", "rename", "rmdir", "mkdir", "touch", "write_text", "write_bytes"),
    *("read_text", "read_bytes", "symlink_to", "hardlink_to", "chmod", "replace"),
}
# Whose methods these are no paths: they lead through what is open, or to a store.
OTHERS = {"folder", "place", "records", "registry", "checkpoint", "target", "storage", "ckpt"}
OTHERS |= {"filesystem", "torch"}

# Where a file is opened, made or removed by its path all the same, and why.
ALLOWED = {
    "hooks/builtin.py": "hooks write where they are told to, and are sealed afterwards",
    "_format/encode.py": "the same",
    "_sharded/writing.py": "the same, by torch.distributed.checkpoint",
    "epoch.py": "the same",
    "_catalog/index.py": "directly in the run folder, O_NOFOLLOW",
    "_layout/history.py": "directly in the run folder, O_NOFOLLOW",
    "_layout/lock.py": "directly in the run folder, O_NOFOLLOW",
    "_layout/owner.py": "directly in the run folder, O_NOFOLLOW, and /proc",
    "_remote/registry.py": "the user's cache",
    "_remote/sftp.py": "a server's files",
    "_format/keys.py": "the user's own keys",
    "cli/checking.py": "the user's own script",
    "export.py": "where the user wants a file",
    "transfer.py": "where the user wants a file",
    "plugin/_private/log_runs.py": "what the user's own loggers wrote",
    "plugin/selftest.py": "a temporary folder of its own",
    "report.py": "this package's own files",
    "plugin/session.py": "doors",
}


def by_path(source):
    """Return the calls in a module that open, make or remove something by its path."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id == "open":
            found.append("open")
        if not isinstance(function, ast.Attribute):
            continue
        owner, name = ast.unparse(function.value), function.attr
        if owner == "shutil" or (owner == "os" and name in OF_OS):
            found.append(f"{owner}.{name}")
        elif owner == "torch" and name in ("load", "save"):
            if not is_stream(node.args[name == "save"]):
                found.append(f"torch.{name}")
        elif (
            owner != "os"
            and name in OF_PATHS
            and owner.rpartition(".")[2] not in OTHERS
            # Text has a `replace` of two arguments.
            and (name != "replace" or len(node.args) == 1)
        ):
            found.append(f".{name}")
    return found


def is_stream(argument):
    """Return whether torch is given an open file."""
    text = ast.unparse(argument)
    return text.startswith(("stream", "buffer", "part", "file", "cast(", "_by_descriptor("))


class TestNoOtherWay:
    """Read from the source of the package."""

    def test_only_the_disk_opens_makes_and_removes_by_path(self):
        """All else goes through it, or stands in the list above with the reason."""
        found = {}
        for path in sorted(PACKAGE.rglob("*.py")):
            name = path.relative_to(PACKAGE).as_posix()
            calls = by_path(path.read_text())
            if calls and not name.startswith("_io/") and name not in ALLOWED:
                found[name] = calls
        assert found == {}

    def test_the_list_has_nothing_that_is_not_needed(self):
        """A room that was tidied is kept so."""
        for name in ALLOWED:
            assert by_path((PACKAGE / name).read_text()), name

    @pytest.mark.parametrize(
        "line",
        [
            "open(path)",
            "os.unlink(path)",
            "os.open(path, os.O_RDONLY)",
            "shutil.rmtree(path)",
            "Path(path).write_text('x')",
            "(folder_path / 'a').unlink()",
            "path.open('rb')",
            "beside.replace(path)",
            "path.rename(other)",
            "torch.load(path, mmap=True)",
            "torch.save(state, path)",
        ],
    )
    def test_it_sees_each_way_that_there_is(self, line):
        """So it can fail."""
        assert by_path(line)

    @pytest.mark.parametrize(
        "line", ["folder.open(name, 0)", "text.replace('a', 'b')", "torch.load(stream)"]
    )
    def test_it_lets_the_right_ways_be(self, line):
        """So it can pass."""
        assert by_path(line) == []
