"""Annotations: what is said of a checkpoint after it was saved."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from _python import python

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout import annotations
from lightning_sbckpt._layout.annotations import (
    ANNOTATIONS_NAME,
    Annotations,
    annotate,
    pin,
    read_annotations,
    unpin,
)
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt._layout.publish import META_NAME, read_checkpoint
from lightning_sbckpt.errors import CheckpointNotFoundError, MetaError, SaveError

STORAGE = LocalStorage()


@pytest.fixture
def folder(tmp_path):
    """One checkpoint with a loss of 0.5."""
    checkpointer = Checkpointer(tmp_path, {"model": torch.nn.Linear(1, 1)})
    return checkpointer.save_checkpoint({"loss": 0.5}, name="a").path


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


class TestWhatIsSaid:
    """Readers see it as if it had been saved."""

    def test_a_metric_computed_later_ranks(self, tmp_path):
        """By another process than the one that looks, which has looked before."""
        checkpointer = Checkpointer(tmp_path)
        first, second = checkpointer.save_checkpoint(), checkpointer.save_checkpoint()
        assert checkpointer.find_checkpoint(max_key="bleu") is None
        code = """
import sys
from pathlib import Path
from lightning_sbckpt._layout.annotations import annotate
from lightning_sbckpt._io.storage import LocalStorage
for folder, bleu in zip(sys.argv[1:], (31.5, 30.0)):
    annotate(Path(folder), {"bleu": bleu}, storage=LocalStorage())
"""
        python("-c", code, first.path, second.path).check_returncode()
        best = checkpointer.find_checkpoint(max_key="bleu")
        assert (best.path, best.meta["bleu"]) == (first.path, 31.5)
        assert len(checkpointer.find_checkpoints(ckpt_predicate=lambda c: c.meta["bleu"] > 31)) == 1

    def test_what_was_saved_stays_as_it_was(self, folder, tree_bytes):
        """The files and their checksums; the new value only goes before the saved one."""
        before = tree_bytes(folder)
        annotate(folder, {"loss": 0.25}, storage=STORAGE)
        after = tree_bytes(folder)
        assert after.pop(ANNOTATIONS_NAME)
        assert after == before
        assert find_damage(folder) == []
        assert read_checkpoint(folder).meta["loss"] == 0.25

    def test_it_adds_up(self, folder):
        """Keys, notes and tags of several times; the last value of a key counts."""
        annotate(folder, {"a": 1, "b": 1}, storage=STORAGE, note="one", tags=["x", "y"])
        said = annotate(folder, {"b": 2}, storage=STORAGE, note="two", tags=["y", "z"])
        assert said == read_annotations(folder)
        meta = read_checkpoint(folder).meta
        assert (meta["a"], meta["b"], meta["loss"]) == (1, 2, 0.5)
        assert (meta["notes"], meta["tags"]) == (["one", "two"], ["x", "y", "z"])
        assert "pinned" not in meta

    def test_nothing_said_shows_nothing(self, folder):
        """No key comes from an empty field."""
        assert read_annotations(folder) is None
        pin(folder, "for the paper", storage=STORAGE)
        assert read_checkpoint(folder).meta["pinned"] == "for the paper"
        assert unpin(folder, storage=STORAGE) == Annotations(notes=[], tags=[])
        assert set(read_checkpoint(folder).meta) == {"unixtime", "end-of-epoch", "loss"}

    def test_a_pin_needs_no_reason_and_survives_annotating(self, folder):
        """And the other way round."""
        annotate(folder, {"bleu": 1.0}, storage=STORAGE)
        pin(folder, storage=STORAGE)
        annotate(folder, {"wer": 2.0}, storage=STORAGE)
        meta = read_checkpoint(folder).meta
        assert (meta["pinned"], meta["bleu"], meta["wer"]) == ("pinned", 1.0, 2.0)

    def test_values_are_made_plain(self, folder):
        """Numbers from tensors, larger tensors as in the saved meta."""
        annotate(folder, {"x": torch.tensor(0.5), "t": torch.tensor([1.0, 2.0])}, storage=STORAGE)
        meta = read_checkpoint(folder).meta
        assert type(meta["x"]) is float and torch.equal(meta["t"], torch.tensor([1.0, 2.0]))

    def test_a_folder_of_speechbrain_is_annotated_too(self, tmp_path):
        """It has no manifest, and its own files stay as they are."""
        folder = tmp_path / "CKPT+sb"
        folder.mkdir()
        (folder / META_NAME).write_text("unixtime: 1.5\nend-of-epoch: true\n")
        annotate(folder, {"wer": 3}, storage=STORAGE)
        assert read_checkpoint(folder).meta == {"unixtime": 1.5, "end-of-epoch": True, "wer": 3}

    def test_speechbrain_reads_an_annotated_checkpoint(self, folder, speechbrain):
        """As it was saved, with the same files."""
        theirs = speechbrain.utils.checkpoints.Checkpointer(folder.parent)
        before = theirs.list_checkpoints()
        annotate(folder, {"loss": 0.1}, storage=STORAGE, note="late")
        assert theirs.list_checkpoints() == before
        assert before[0].meta["loss"] == 0.5


class TestRefused:
    """What can't be meant is refused before anything is written."""

    @pytest.mark.parametrize("key", ["unixtime", "end-of-epoch", "pinned", "notes", "tags"])
    def test_keys_with_a_meaning(self, folder, key):
        """The message names the key and what to use instead."""
        with pytest.raises(
            MetaError, match=rf"CKPT\+a can't be annotated: it says '{key}'.*pin\(\)"
        ):
            annotate(folder, {"fine": 1, key: 5}, storage=STORAGE)
        assert read_annotations(folder) is None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"meta": {"x": object()}}, "'x' is a object"),
            ({"meta": {}, "tags": "word"}, "tags='word': expected a list"),
            ({"meta": {}, "tags": [1]}, r"tags=\[1\]: expected a list"),
            ({"meta": {}, "note": ""}, "note='': expected a sentence"),
        ],
    )
    def test_values_that_can_not_be_kept(self, folder, arguments, message):
        """Each with what is expected."""
        with pytest.raises(MetaError, match=message):
            annotate(folder, storage=STORAGE, **arguments)
        assert read_annotations(folder) is None

    def test_more_than_can_be_read_again(self, folder, monkeypatch):
        """Else it would be lost with all that was said before."""
        monkeypatch.setattr(annotations, "MAX_META_BYTES", 1000)
        with pytest.raises(MetaError, match=r"would have 2,\d+ bytes, more than the 1,000"):
            annotate(folder, {"x": "y" * 2000}, storage=STORAGE)
        assert read_annotations(folder) is None

    def test_what_is_no_checkpoint(self, tmp_path):
        """A missing folder, one without meta, a file."""
        (tmp_path / "CKPT+empty").mkdir()
        (tmp_path / "CKPT+file").touch()
        for name in ("CKPT+none", "CKPT+empty", "CKPT+file"):
            with pytest.raises(CheckpointNotFoundError, match=rf"{name[5:]} is not annotated"):
                annotate(tmp_path / name, {"x": 1}, storage=STORAGE)
        assert list((tmp_path / "CKPT+empty").iterdir()) == []

    def test_a_checkpoint_removed_in_the_middle(self, folder):
        """It is said so, and nothing is left."""

        class RemovedMeanwhile(LocalStorage):
            def before(self, operation, path, target=None):
                if operation == "rename":
                    STORAGE.remove_tree(folder)

        with pytest.raises(CheckpointNotFoundError, match="removed meanwhile"):
            annotate(folder, {"x": 1}, storage=RemovedMeanwhile())
        assert not folder.exists()

    def test_a_full_disk(self, folder):
        """The message says what holds; what was said before does."""
        annotate(folder, {"x": 1}, storage=STORAGE)

        class Full(LocalStorage):
            def before(self, operation, path, target=None):
                if operation == "write":
                    raise OSError(28, "No space left on device")

        with pytest.raises(SaveError, match=r"ANNOTATIONS\.yaml can't be written: No space left"):
            annotate(folder, {"x": 2}, storage=Full())
        assert read_checkpoint(folder).meta["x"] == 1
        annotate(folder, {"x": 3}, storage=STORAGE)
        assert read_checkpoint(folder).meta["x"] == 3


def spoilt(kind, data, other):
    if kind == "a flipped bit":
        return data.replace(b"x: 1", b"x: 3")
    if kind == "cut off":
        return data[: len(data) // 2]
    if kind == "empty":
        return b""
    if kind == "binary":
        return bytes(range(256))
    if kind == "of another checkpoint":
        return other
    if kind == "a later format":
        body = data.rpartition(b"annotations-checksum")[0].replace(b"format: 1", b"format: 2")
    elif kind == "a time of its own":
        body = data.rpartition(b"annotations-checksum")[0] + b"  unixtime: 5.0\n"
    else:
        body = data.rpartition(b"annotations-checksum")[0].replace(b"notes: []", b"notes: 5")
    return body + annotations._checksum_line(body) + b"\n"


class TestDamage:
    """Annotations that can't be read leave the checkpoint usable, and safe from removal."""

    @pytest.mark.parametrize(
        ("kind", "reason"),
        [
            ("a flipped bit", "not the checksum"),
            ("cut off", "not the checksum"),
            ("empty", "not the checksum"),
            ("binary", "not the checksum"),
            ("of another checkpoint", "is of another checkpoint"),
            ("a later format", "has format 2"),
            ("a time of its own", "says 'unixtime'"),
            ("wrong types", "does not hold meta, pinned, notes and tags"),
        ],
    )
    def test_the_saved_meta_counts_with_one_warning(self, tmp_path, caplog, kind, reason):
        """However often it is listed; the checkpoint counts as pinned, and is found and loaded."""
        checkpointer = Checkpointer(tmp_path, {"model": torch.nn.Linear(1, 1)})
        first = checkpointer.save_checkpoint({"loss": 0.5})
        second = checkpointer.save_checkpoint({"loss": 0.6})
        for ckpt in (first, second):
            annotate(ckpt.path, {"x": 1}, storage=STORAGE)
        path = first.path / ANNOTATIONS_NAME
        path.write_bytes(
            spoilt(kind, path.read_bytes(), (second.path / ANNOTATIONS_NAME).read_bytes())
        )
        settle(first.path)
        for _ in range(3):
            found = checkpointer.find_checkpoint(min_key="loss")
            assert found.path == first.path and "x" not in found.meta
            assert found.meta["pinned"].startswith("can't tell")
        assert checkpointer.recover_if_possible(min_key="loss").path == first.path
        (warning,) = warnings_in(caplog)
        assert reason in warning and str(path) in warning
        with pytest.raises(MetaError, match=reason):
            annotate(first.path, {"y": 1}, storage=STORAGE)

    def test_a_pipe_in_its_place_is_not_waited_for(self, folder, caplog):
        """Nor a link followed."""
        os.mkfifo(folder / ANNOTATIONS_NAME)
        assert read_checkpoint(folder).meta["loss"] == 0.5
        (warning,) = warnings_in(caplog)
        assert "named pipe" in warning


def settle(folder):
    """Make every time of a folder old enough to be trusted, as waiting would."""
    time.sleep(0.15)


def annotate_many(folder, start, count):
    for i in range(start, start + count):
        annotate(folder, {f"k{i}": i}, storage=STORAGE, tags=[f"t{i}"])


class TestSeveralAtOnce:
    """Nothing that was said is lost."""

    def test_processes(self, folder):
        """Each adds its own keys, all at the same time."""
        context = multiprocessing.get_context("fork")
        workers = [
            context.Process(target=annotate_many, args=(folder, i * 10, 10)) for i in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0] * 4
        said = read_annotations(folder)
        assert said.meta == {f"k{i}": i for i in range(40)}
        assert set(said.tags) == {f"t{i}" for i in range(40)}

    def test_threads(self, folder):
        """They have one process, and locks that are per open file."""
        threads = [
            threading.Thread(target=annotate_many, args=(folder, i * 5, 5)) for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(read_annotations(folder).meta) == 20

    def test_one_that_never_ends_is_not_waited_for_for_ever(self, folder, monkeypatch):
        """The message says what to do."""
        monkeypatch.setattr(annotations, "_LOCK_SECONDS", 0.05)
        with (
            annotations._locked(folder),
            pytest.raises(SaveError, match="another process has been"),
        ):
            annotate(folder, {"x": 1}, storage=STORAGE)
        annotate(folder, {"x": 1}, storage=STORAGE)

    def test_a_checkpoint_that_came_in_its_place_is_not_mistaken_for_it(
        self, tmp_path, monkeypatch
    ):
        """What waited for the old one annotates the new one, under the new one's lock."""
        checkpointer = Checkpointer(tmp_path)
        folder = checkpointer.save_checkpoint({"n": 1}, name="best").path
        found_it_locked, go_on = threading.Event(), threading.Event()

        def sleep(seconds):
            found_it_locked.set()
            go_on.wait()
            time.sleep(seconds)

        monkeypatch.setattr(
            annotations, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
        )
        waiting = threading.Thread(target=annotate_many, args=(folder, 0, 1))
        with contextlib.ExitStack() as new:
            with annotations._locked(folder):
                waiting.start()
                assert found_it_locked.wait(60)
                checkpointer.save_checkpoint({"n": 2}, name="best")
                new.enter_context(annotations._locked(folder))
            found_it_locked.clear()
            go_on.set()
            assert found_it_locked.wait(60)
            assert read_annotations(folder) is None
        waiting.join()
        meta = read_checkpoint(folder).meta
        assert (meta["n"], meta["k0"]) == (2, 0)

    def test_a_lock_on_a_folder_that_was_just_replaced_does_not_count(self, tmp_path, monkeypatch):
        """It is that of the old folder, and keeps nobody from the new one."""
        checkpointer = Checkpointer(tmp_path)
        folder = checkpointer.save_checkpoint(name="best").path
        real, locked = annotations._try_lock, []

        def replaced_before_the_lock(descriptor):
            if not locked:
                checkpointer.save_checkpoint(name="best")
            locked.append(descriptor)
            return real(descriptor)

        monkeypatch.setattr(annotations, "_try_lock", replaced_before_the_lock)
        with annotations._locked(folder):
            other = os.open(folder, os.O_RDONLY)
            assert not real(other)
            os.close(other)
        assert len(locked) == 2


class TestDying:
    """Whatever kills it, readers find what was said before or what is said now."""

    OPERATIONS = ("remove_file", "create", "write", "flush_file", "rename", "flush_dir")

    @pytest.mark.parametrize("at", OPERATIONS)
    def test_a_kill_at_each_operation_leaves_old_or_new(self, folder, at, caplog):
        """And the next one works."""
        annotate(folder, {"x": 1}, storage=STORAGE)

        class Dying(LocalStorage):
            def before(self, operation, path, target=None):
                if operation == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        child = multiprocessing.get_context("fork").Process(
            target=annotate, args=(folder, {"x": 2}), kwargs={"storage": Dying()}
        )
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        expected = 2 if at == "flush_dir" else 1
        assert read_checkpoint(folder).meta["x"] == expected
        annotate(folder, {"x": 3}, storage=STORAGE)
        assert read_checkpoint(folder).meta["x"] == 3
        assert warnings_in(caplog) == []

    def test_these_are_all_the_operations(self, folder):
        """A new one can't slip by."""
        seen = []

        class Telling(LocalStorage):
            def before(self, operation, path, target=None):
                seen.append(operation)

        annotate(folder, {"x": 1}, storage=Telling())
        assert tuple(seen) == self.OPERATIONS
