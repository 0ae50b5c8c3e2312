"""Watching a folder: every change is noted at once, and nothing is asked of the disk without one."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import shutil
import time

import pytest

import lightning_sbckpt._catalog.catalog as catalog_module
import lightning_sbckpt._catalog.watch as watch_module
from lightning_sbckpt._catalog.catalog import Catalog
from lightning_sbckpt._catalog.watch import watch
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.annotations import annotate, pin
from lightning_sbckpt._layout.publish import folder_names
from lightning_sbckpt.selection import importance

LOWEST = importance(min_key="loss")
COUNT = 70


def make(root, name, loss):
    folder = root / f"CKPT+{name}"
    folder.mkdir()
    (folder / "model.ckpt").touch()
    (folder / "CKPT.yaml").write_text(f"unixtime: {1000.0 + loss}\nloss: {loss}\n")
    return folder


@pytest.fixture
def root(tmp_path):
    """Many checkpoints, 000 the best, and times that are old enough."""
    root = tmp_path / "above" / "run"
    root.mkdir(parents=True)
    for i in range(COUNT):
        make(root, f"{i:03}", float(i))
    (root / "CKPT+empty").mkdir()
    time.sleep(0.12)
    if watch(root, folder_names) is None:
        pytest.skip("this filesystem can't be watched")
    return root


@pytest.fixture
def calm(root):
    """A catalog of it that has been asked so often that it watches."""
    catalog = Catalog(root, keep_index=False)
    for _ in range(3):
        assert catalog.find(LOWEST, None, 1)[0].path.name == "CKPT+000"
    assert catalog._watch is not None and catalog._watch.is_quiet()
    return catalog


def edit(root):
    """Write into the file, and keep it open."""
    descriptor = os.open(root / "CKPT+005" / "CKPT.yaml", os.O_WRONLY)
    os.write(descriptor, b"unixtime: 1000.0\nloss: -1\n")
    os.ftruncate(descriptor, 26)


def edit_and_set_back(root):
    path = root / "CKPT+005" / "CKPT.yaml"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().replace(b"loss: 5.0", b"loss: -5."))
    os.utime(path, ns=times)


def put_beside_and_rename(root):
    path = root / "CKPT+005" / "new"
    path.write_text("unixtime: 1.0\nloss: -1.0\n")
    path.rename(root / "CKPT+005" / "CKPT.yaml")


def replace_the_folder(root):
    shutil.copytree(root / "CKPT+005", root / "CKPT+new")
    shutil.rmtree(root / "CKPT+000")
    (root / "CKPT+new").rename(root / "CKPT+000")


def replace_everything(root):
    root.parent.rename(root.parent.with_name("elsewhere"))
    root.mkdir(parents=True)
    make(root, "other", 3.0)


CHANGES = {
    "a new one": lambda root: make(root, "new", -1.0),
    "one removed": lambda root: shutil.rmtree(root / "CKPT+000"),
    "one renamed": lambda root: (root / "CKPT+000").rename(root / ".removed+000"),
    "one annotated": lambda root: annotate(
        root / "CKPT+007", {"loss": -2.0}, storage=LocalStorage()
    ),
    "one pinned": lambda root: pin(root / "CKPT+000", storage=LocalStorage()),
    "meta written to": edit,
    "meta written to and its time set back": edit_and_set_back,
    "meta cut off": lambda root: os.truncate(root / "CKPT+000" / "CKPT.yaml", 17),
    "meta replaced": put_beside_and_rename,
    "meta removed": lambda root: (root / "CKPT+000" / "CKPT.yaml").unlink(),
    "meta where there was none": lambda root: (root / "CKPT+empty" / "CKPT.yaml").write_text(
        "unixtime: 1.0\nloss: -1.0\n"
    ),
    "a file removed": lambda root: (root / "CKPT+000" / "model.ckpt").unlink(),
    "a file added": lambda root: (root / "CKPT+000" / "more.ckpt").touch(),
    "one replaced": replace_the_folder,
    "another folder at the path": replace_everything,
    "all removed": shutil.rmtree,
}


class TestEveryChange:
    """What a catalog that watches says is what one that looks says."""

    @pytest.mark.sample(10)
    @pytest.mark.parametrize("change", CHANGES)
    def test_is_seen_by_the_next_question(self, root, calm, change):
        """At once, without any waiting."""
        before = calm.checkpoints()
        CHANGES[change](root)
        assert calm.checkpoints() == Catalog(root, keep_index=False).checkpoints() != before
        found = Catalog(root, keep_index=False).find(LOWEST, None, 1)
        assert calm.find(LOWEST, None, 1) == found

    @pytest.mark.sample(8)
    @pytest.mark.parametrize("moment", ["while it begins", "while the folders are looked at"])
    @pytest.mark.parametrize("change", CHANGES)
    def test_is_seen_if_it_comes(self, root, monkeypatch, change, moment):
        """At the latest by the question after the one in which it came."""
        catalog = Catalog(root, keep_index=False)
        assert catalog.checkpoints() == catalog.checkpoints()
        came = []
        names_in, identify = folder_names, catalog_module._identify

        def happen():
            if not came:
                came.append(change)
                CHANGES[change](root)

        def listing(folder):
            names = names_in(folder)
            happen()
            return names

        def identifying(folder):
            found = identify(folder)
            happen()
            return found

        if moment == "while it begins":
            monkeypatch.setattr(catalog_module, "watch", lambda folder, _: watch(folder, listing))
        else:
            monkeypatch.setattr(catalog_module, "_identify", identifying)
        catalog.checkpoints()
        assert came
        assert catalog.checkpoints() == Catalog(root, keep_index=False).checkpoints()

    def test_in_a_new_checkpoint_that_came_later(self, root, calm):
        """It is watched from the next time on."""
        folder = make(root, "new", -1.0)
        time.sleep(0.12)
        for _ in range(4):
            assert calm.find(LOWEST, None, 1)[0].path == folder
        assert calm._watch.is_quiet()
        (folder / "CKPT.yaml").write_text("unixtime: 1.0\nloss: 100.0\n")
        assert calm.find(LOWEST, None, 1)[0].path.name == "CKPT+000"


class TestWithoutChanges:
    """The disk is left alone."""

    def test_no_folder_is_looked_at(self, calm, monkeypatch):
        """However often it is asked."""

        def refuse(*_):
            raise AssertionError("looked at")

        listed = calm.checkpoints()
        monkeypatch.setattr(catalog_module, "_identify", refuse)
        monkeypatch.setattr(catalog_module, "folder_names", refuse)
        for _ in range(3):
            assert calm.find(LOWEST, None, 1) == listed[:1]
            assert calm.checkpoints() == listed

    def test_reading_is_no_change(self, root, calm):
        """Nor is listing, by whomever."""
        Catalog(root, keep_index=False).checkpoints()
        (root / "CKPT+000" / "model.ckpt").read_bytes()
        assert calm._watch.is_quiet()


class TestWhereItCanNotBeHad:
    """The folders are looked at, and every change is seen all the same."""

    @pytest.mark.parametrize("why", ["network", "too many", "not linux", "no more watches"])
    def test_the_answers_are_the_same(self, root, monkeypatch, why):
        """And it is not tried again and again."""
        real, tried = watch, []
        if why == "network":
            monkeypatch.setattr(watch_module, "_LOCAL", set())
        elif why == "too many":
            monkeypatch.setattr(watch_module, "_MOST_FOLDERS", 10)
        elif why == "not linux":
            monkeypatch.setattr(watch_module.ctypes, "CDLL", lambda *_, **__: object())
        else:
            monkeypatch.setattr(watch_module, "_CHANGES", (0,))  # Refused by the kernel.

        def count(*arguments):
            tried.append(real(*arguments))
            return tried[-1]

        monkeypatch.setattr(catalog_module, "watch", count)
        catalog = Catalog(root, keep_index=False)
        for _ in range(6):
            assert catalog.find(LOWEST, None, 1)[0].path.name == "CKPT+000"
        assert tried == [None]
        make(root, "new", -1.0)
        assert catalog.find(LOWEST, None, 1)[0].path.name == "CKPT+new"

    def test_a_small_folder_is_not_watched(self, tmp_path):
        """Looking costs less than the kernel's memory."""
        make(tmp_path, "a", 1.0)
        time.sleep(0.12)
        catalog = Catalog(tmp_path)
        for _ in range(5):
            catalog.checkpoints()
        assert catalog._watch is None


class TestOtherProcessesAndCopies:
    """A watch belongs to one object, and takes nothing from others."""

    def test_a_forked_process_that_asks_takes_nothing_away(self, root, calm):
        """Both see the change."""
        make(root, "new", -1.0)

        def ask():
            assert calm.find(LOWEST, None, 1)[0].path.name == "CKPT+new"

        child = multiprocessing.get_context("fork").Process(target=ask)
        child.start()
        child.join()
        assert child.exitcode == 0
        ask()

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
    def test_a_copy_has_none(self, calm, copied):
        """And begins one of its own."""
        other = copied(calm)
        assert other._watch is None
        assert other.checkpoints() == calm.checkpoints()
        del other
        assert calm._watch.is_quiet()

    def test_nothing_stays_open(self, root):
        """When the catalog goes, or the watch could not begin."""
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            catalog = Catalog(root, keep_index=False)
            for _ in range(4):
                catalog.checkpoints()
            assert watch(root, lambda folder: ["no such folder"]) is None
        assert len(os.listdir("/proc/self/fd")) == before + 1
        del catalog
        assert len(os.listdir("/proc/self/fd")) == before
