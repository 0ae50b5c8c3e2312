"""The Checkpointer beyond SpeechBrain's behaviours: order, records, folders, retention."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml

from lightning_sbckpt import Checkpointer, EpochCounter, ckpt_recency
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt.errors import ConfigurationError, SaveError, SelectionError
from lightning_sbckpt.retention import Best, Newest


@pytest.fixture
def checkpointer(tmp_path, scale):
    """A checkpointer of one small model."""
    return Checkpointer(tmp_path / "run", {"model": scale(1.0)})


@pytest.fixture
def clock(monkeypatch):
    """The clock, set by hand."""

    class Clock:
        now = 1_800_000_000.0

    monkeypatch.setattr(time, "time", lambda: Clock.now)
    return Clock


class TestOrder:
    """Which checkpoint is newer never rests on the clock."""

    @pytest.mark.parametrize("steps", [[0] * 6, [0, -1, -3600, -1e9, 5, -5], [0, 1e-7, 2e-7]])
    def test_saves_are_ordered_as_they_were_made(self, checkpointer, clock, steps):
        """The clock stands still, jumps back, creeps."""
        saved = []
        for step in steps:
            clock.now += step
            saved.append(checkpointer.save_checkpoint().path)
        assert [ckpt.path for ckpt in checkpointer.find_checkpoints()] == saved[::-1]
        times = [ckpt_recency(ckpt) for ckpt in checkpointer.find_checkpoints()]
        assert sorted(set(times), reverse=True) == times

    def test_another_checkpointer_goes_on_from_what_it_finds(self, tmp_path, clock, checkpointer):
        """A restart on a machine whose clock is behind, and two at once."""
        paths = [checkpointer.save_checkpoint().path]
        for other in (Checkpointer(tmp_path / "run"), checkpointer):
            clock.now -= 100
            paths.append(other.save_checkpoint().path)
        assert [ckpt.path for ckpt in checkpointer.find_checkpoints()] == paths[::-1]

    def test_a_deleted_newest_does_not_let_the_next_be_older(self, checkpointer, clock):
        """What was saved last is later than all that this process has ever saved."""
        first = checkpointer.save_checkpoint()
        checkpointer.delete_checkpoints(num_to_keep=0)
        clock.now -= 50
        assert ckpt_recency(checkpointer.save_checkpoint()) > ckpt_recency(first)

    def test_names_of_one_second_are_numbered(self, checkpointer, clock):
        """And no folder is ever reused."""
        names = [checkpointer.save_checkpoint().path.name for _ in range(3)]
        assert len({name[: -len("+00")] for name in names}) == 1
        assert [name[-3:] for name in names] == ["+00", "+01", "+02"]


class TestRecords:
    """What `list_checkpoints` returns."""

    def test_records_are_copies(self, checkpointer):
        """What a caller does with one does not come back in the next list, however deep."""
        meta = {"nested": {"list": [1, 2]}, "tensor": torch.ones(2), "loss": 1.0}
        saved = checkpointer.save_checkpoint(meta)
        for ckpt in (*checkpointer.list_checkpoints(), saved):
            ckpt.meta["loss"] = 0.0
            ckpt.meta["nested"]["list"].append(3)
            ckpt.meta["tensor"][0] = 7
            ckpt.paramfiles.clear()
        (again,) = checkpointer.list_checkpoints()
        assert again.meta["loss"] == 1.0
        assert again.meta["nested"] == {"list": [1, 2]}
        assert again.meta["tensor"].tolist() == [1.0, 1.0]
        assert set(again.paramfiles) == {"model"}
        assert meta["nested"] == {"list": [1, 2]} and meta["tensor"].tolist() == [1.0, 1.0]

    def test_changes_by_another_process_are_seen(self, tmp_path, checkpointer):
        """Folders added and deleted, files added, meta replaced."""
        for name in "ab":
            checkpointer.save_checkpoint({"loss": 1.0}, name=name)
        run = tmp_path / "run"

        def listed():
            return {ckpt.path.name[-1]: ckpt for ckpt in checkpointer.list_checkpoints()}

        assert set(listed()) == {"a", "b"}
        shutil.rmtree(run / "CKPT+a")
        Checkpointer(run).save_checkpoint({"loss": 2.0}, name="c")
        assert set(listed()) == {"b", "c"}
        shutil.copy(run / "CKPT+b" / "model.ckpt", run / "CKPT+b" / "more.ckpt")
        assert set(listed()["b"].paramfiles) == {"model", "more"}
        changed = run / "CKPT+b" / "new.yaml"
        changed.write_text("unixtime: 5.0\nloss: 9.0\n")
        changed.replace(run / "CKPT+b" / "CKPT.yaml")
        assert listed()["b"].meta == {"unixtime": 5.0, "loss": 9.0}
        (run / "CKPT+b" / "CKPT.yaml").unlink()
        assert set(listed()) == {"c"}

    def test_a_root_that_vanished_is_empty_and_made_again_by_a_save(self, tmp_path, checkpointer):
        """As after `rm -r run` while training."""
        checkpointer.save_checkpoint()
        shutil.rmtree(tmp_path / "run")
        assert checkpointer.list_checkpoints() == []
        assert checkpointer.find_checkpoint() is None
        assert checkpointer.recover_if_possible() is None
        assert checkpointer.delete_checkpoints() == []
        saved = checkpointer.save_checkpoint()
        assert checkpointer.list_checkpoints() == [saved]

    def test_a_folder_may_be_moved(self, tmp_path, checkpointer, scale):
        """It holds no absolute path: sound and loadable wherever it lies."""
        checkpointer.save_checkpoint(name="a")
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        model = scale(5.0)
        ckpt = Checkpointer(tmp_path / "elsewhere", {"model": model}).recover_if_possible()
        assert ckpt.path == tmp_path / "elsewhere" / "CKPT+a"
        assert model.value == 1.0 and find_damage(ckpt.path) == []
        for file in ckpt.path.iterdir():
            assert str(tmp_path).encode() not in file.read_bytes()

    def test_links_to_checkpoints_are_neither_listed_nor_followed(self, tmp_path, checkpointer):
        """A link named like a checkpoint, and saving under its name."""
        saved = checkpointer.save_checkpoint(name="a")
        outside = tmp_path / "outside"
        shutil.copytree(saved.path, outside)
        (tmp_path / "run" / "CKPT+link").symlink_to(outside)
        assert checkpointer.list_checkpoints() == [saved]
        before = sorted(os.listdir(outside))
        checkpointer.save_checkpoint(name="link")
        assert sorted(os.listdir(outside)) == before
        assert not (tmp_path / "run" / "CKPT+link").is_symlink()


class TestFolders:
    """Which folders are taken."""

    @pytest.mark.parametrize("url", ["nosuch://bucket/run", Path("nosuch://bucket/run")])
    def test_a_url_of_no_known_store_makes_no_folder_named_like_it(
        self, tmp_path, monkeypatch, url
    ):
        """Nor any other; the stores that there are have tests of their own."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        with pytest.raises(ConfigurationError, match="nosuch://bucket/run can't be used"):
            Checkpointer(url)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("where", ["file", "file/below"])
    def test_a_file_in_the_place_of_the_folder_is_refused(self, tmp_path, where):
        """With the path, and left as it is."""
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ConfigurationError, match=rf"{where} can't be made a folder"):
            Checkpointer(tmp_path / where)
        assert (tmp_path / "file").read_text() == "mine"

    def test_relative_folders_and_colons_are_fine(self, tmp_path, monkeypatch, scale):
        """Only what looks like a URL is refused."""
        monkeypatch.chdir(tmp_path)
        for folder in ("run", "a/b", "time 12:30", "c:"):
            Checkpointer(folder, {"model": scale(1.0)})
            assert (tmp_path / folder).is_dir()

    def test_two_checkpointers_share_a_folder(self, tmp_path, scale):
        """Each sees what the other saves, and neither takes the name of the other's."""
        first = Checkpointer(tmp_path, {"model": scale(1.0)})
        second = Checkpointer(tmp_path, {"model": scale(2.0)})
        saved = [pointer.save_checkpoint() for pointer in (first, second, first, second)]
        assert len({ckpt.path for ckpt in saved}) == 4
        assert first.list_checkpoints() == second.list_checkpoints() == saved
        assert first.recover_if_possible() == saved[-1]
        assert first.recoverables["model"].value == 2.0


class Tokenizer:
    """An object that saves itself as a folder, as many do by `save_pretrained`."""

    def __init__(self, words=()):
        self.words = list(words)

    @staticmethod
    def save(obj, path):
        (path / "deep").mkdir(parents=True)
        (path / "vocab.json").write_text(json.dumps(obj.words))
        (path / "deep" / "size.txt").write_text(str(len(obj.words)))

    @staticmethod
    def load(obj, path, end_of_epoch):
        obj.words = json.loads((path / "vocab.json").read_text())
        assert (path / "deep" / "size.txt").read_text() == str(len(obj.words))


class TestHooksThatWriteFolders:
    """A hook may make its path a folder, or write files beside it."""

    @pytest.fixture
    def saved(self, tmp_path):
        """A checkpointer of a tokenizer, and its checkpoint."""
        checkpointer = Checkpointer(tmp_path)
        checkpointer.add_recoverable(
            "tokenizer", Tokenizer(["a", "b"]), Tokenizer.load, Tokenizer.save
        )
        return checkpointer, checkpointer.save_checkpoint()

    def test_it_comes_back_and_every_file_is_in_the_manifest(self, saved):
        """With size and checksum."""
        checkpointer, ckpt = saved
        files = yaml.safe_load((ckpt.path / "MANIFEST.yaml").read_text())["files"]
        assert set(files) == {
            "CKPT.yaml",
            "tokenizer.ckpt/vocab.json",
            "tokenizer.ckpt/deep/size.txt",
        }
        checkpointer.recoverables["tokenizer"].words = []
        assert checkpointer.recover_if_possible() == ckpt
        assert checkpointer.recoverables["tokenizer"].words == ["a", "b"]

    @pytest.mark.parametrize("name", ["vocab.json", "deep/size.txt"])
    def test_a_changed_byte_inside_is_found(self, saved, name):
        """Not only another size."""
        checkpointer, ckpt = saved
        file = ckpt.path / "tokenizer.ckpt" / name
        file.write_text(file.read_text().replace("2", "3").replace("a", "z"))
        with pytest.raises(RuntimeError, match=f"tokenizer.ckpt/{name} has other bytes"):
            checkpointer.recover_if_possible()

    def test_it_is_deleted_with_its_checkpoint(self, saved, tmp_path):
        """Nothing is left."""
        saved[0].delete_checkpoints(num_to_keep=0)
        assert [
            name for name in os.listdir(tmp_path) if name not in {".lock", "HISTORY.jsonl"}
        ] == []

    @pytest.mark.parametrize(
        ("hook", "message"),
        [
            (lambda obj, path: None, "wrote nothing to the path"),
            (
                lambda obj, path: path.symlink_to("/etc/hostname"),
                r"left obj\.ckpt in the checkpoint: it is a symbolic link",
            ),
            (
                lambda obj, path: (path.mkdir(), (path / "link").symlink_to("/etc")),
                r"left obj\.ckpt/link in the checkpoint: it is a symbolic link",
            ),
            (lambda obj, path: path.write_text(obj.missing), "AttributeError.*missing"),
        ],
        ids=["nothing", "link", "link to a folder", "raises"],
    )
    def test_what_is_no_state_is_refused_and_nothing_remains(self, tmp_path, hook, message):
        """The error names what is wrong; earlier checkpoints stay."""
        checkpointer = Checkpointer(tmp_path, {"obj": object()})
        checkpointer.custom_save_hooks["obj"] = hook
        with pytest.raises(SaveError, match=f"(?s){message}.*Nothing of this checkpoint is kept"):
            checkpointer.save_checkpoint()
        assert [
            name for name in os.listdir(tmp_path) if name not in {".lock", "HISTORY.jsonl"}
        ] == []


class TestRetention:
    """Deletion by rules, dry runs and protection."""

    def test_a_dry_run_deletes_nothing_and_gives_every_reason(self, checkpointer, tree_bytes):
        """The same decisions are then carried out, each with a line in the log."""
        for loss in (3.0, 1.0, 2.0, 4.0):
            checkpointer.save_checkpoint({"loss": loss}, name=f"{loss:.0f}")
        before = tree_bytes(checkpointer.checkpoints_dir)
        arguments = {"num_to_keep": 1, "min_keys": ["loss"]}
        planned = checkpointer.delete_checkpoints(**arguments, dry_run=True)
        assert tree_bytes(checkpointer.checkpoints_dir) == before
        assert {d.checkpoint.path.name: d.keep for d in planned} == {
            "CKPT+1": True,
            "CKPT+2": False,
            "CKPT+3": False,
            "CKPT+4": True,
        }
        assert all(decision.reason for decision in planned)
        assert checkpointer.delete_checkpoints(**arguments) == planned
        assert {ckpt.path.name for ckpt in checkpointer.list_checkpoints()} == {"CKPT+1", "CKPT+4"}

    def test_the_protected_stay_whatever_the_rules_say(self, checkpointer, caplog):
        """With the reason given."""
        caplog.set_level(logging.INFO)
        saved = [checkpointer.save_checkpoint({"loss": float(i)}) for i in range(4)]
        plan = checkpointer.apply_retention(
            [Newest(1), Best("loss")], protected=[(saved[1], "this run was resumed from it")]
        )
        assert checkpointer.list_checkpoints() == [saved[0], saved[1], saved[3]]
        reasons = {decision.checkpoint: decision.reason for decision in plan}
        assert "this run was resumed from it" in reasons[saved[1]]
        (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("removed")]
        assert str(saved[2].path) in line and reasons[saved[2]] in line

    def test_unusable_arguments_cost_no_save(self, checkpointer):
        """They are refused before anything is written."""
        with pytest.raises(SelectionError):
            checkpointer.save_and_keep_only(num_to_keep=-1)
        assert checkpointer.list_checkpoints() == []

    def test_what_is_not_a_checkpoint_is_never_touched(self, checkpointer, tmp_path):
        """Files and folders of the user's, whatever they are called."""
        run = tmp_path / "run"
        (run / "CKPT+mine").mkdir()
        (run / "CKPT+mine" / "notes.txt").write_text("mine")
        (run / "CKPT+file").write_text("mine")
        (run / "events").mkdir()
        checkpointer.save_checkpoint()
        checkpointer.delete_checkpoints(num_to_keep=0)
        Checkpointer(run)
        assert sorted(os.listdir(run)) == [
            ".lock",
            "CKPT+file",
            "CKPT+mine",
            "HISTORY.jsonl",
            "events",
        ]
        assert (run / "CKPT+mine" / "notes.txt").read_text() == "mine"

    def test_one_deleted_meanwhile_is_no_trouble(self, checkpointer):
        """Another process was faster."""
        saved = [checkpointer.save_checkpoint() for _ in range(3)]

        def slow(ckpt):
            shutil.rmtree(saved[0].path, ignore_errors=True)
            return True

        checkpointer.delete_checkpoints(ckpt_predicate=slow)
        assert checkpointer.list_checkpoints() == saved[2:]


def test_one_line_tells_of_each_event(checkpointer, caplog):
    """Saving says path, number of files, size and time; loading what and from where."""
    caplog.set_level(logging.INFO)
    saved = checkpointer.save_checkpoint(end_of_epoch=False)
    checkpointer.recover_if_possible()
    save, load = [record.getMessage() for record in caplog.records]
    assert save.startswith(f"saved {saved.path} (within an epoch): 1 files, 0.0 MB in ")
    assert load.startswith(f"loaded model from {saved.path} in ")


def test_wait_returns_since_every_save_is_durable(checkpointer):
    """It is there for code that also saves in the background."""
    checkpointer.save_checkpoint()
    assert checkpointer.wait() is None


def test_the_name_of_a_checkpoint_that_was_removed_is_not_used_again(tmp_path):
    """Who is just reading it must not find another one in its place."""
    checkpointer = Checkpointer(tmp_path, {"model": torch.nn.Linear(1, 1)})
    names = set()
    for _ in range(30):
        saved = checkpointer.save_checkpoint()
        names.add(saved.path.name)
        checkpointer.delete_checkpoints(num_to_keep=0)
    assert len(names) == 30


class TestCopies:
    """A checkpointer goes wherever the rest of a program's settings go, as SpeechBrain's does."""

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
    def test_a_copy_saves_and_finds_in_the_same_folder(self, tmp_path, copied):
        """With the recoverables copied along, and settings, hooks and annotations of the user's."""
        model, counter = torch.nn.Linear(1, 1), EpochCounter(3)
        original = Checkpointer(
            tmp_path,
            {"model": model, "notes": {}},
            custom_save_hooks={"notes": touch},
            save_mode="async",
            on_save_error="warn",
        )
        original.add_recoverable("counter", counter, optional_load=True)
        original.of_mine = 3
        original.save_checkpoint({"loss": 0.5})
        next(counter)
        other = copied(original)
        original.wait()
        assert other.recoverables["counter"].current == 1
        assert other.recoverables["model"] is not model
        assert torch.equal(other.recoverables["model"].weight, model.weight)
        assert (other.of_mine, other.registry is original.registry) == (3, True)
        assert other.optional_recoverables["counter"]
        other.save_checkpoint({"loss": 0.25})
        other.wait()
        assert original.find_checkpoint(min_key="loss").meta["loss"] == 0.25
        original.save_checkpoint()
        original.wait()
        assert len(other.list_checkpoints()) == 3

    def test_what_refers_to_it_is_copied_with_it(self, tmp_path):
        """A recoverable that holds its checkpointer, as SpeechBrain's `Brain`."""
        brain = EpochCounter(3)
        brain.checkpointer = Checkpointer(tmp_path, {"brain": brain})
        other = copy.deepcopy(brain)
        assert other.checkpointer.recoverables["brain"] is other
        other.checkpointer.save_checkpoint()
        assert len(brain.checkpointer.list_checkpoints()) == 1


def touch(_, path):
    """Save nothing."""
    path.touch()


class TestFolderOfAReader:
    """Who only looks leaves nothing behind, and a folder is that of the start."""

    def test_reading_makes_no_folder(self, tmp_path):
        """A misspelled name must not be there from then on; what has nothing to save may only read."""
        typo = tmp_path / "above" / "typo"
        checkpointer = Checkpointer(typo)
        assert checkpointer.find_checkpoint() is None
        assert checkpointer.list_checkpoints() == []
        assert checkpointer.recover_if_possible() is None
        checkpointer.delete_checkpoints(num_to_keep=1)
        checkpointer.wait()
        assert not list(tmp_path.iterdir())
        checkpointer.save_checkpoint()
        assert len(checkpointer.list_checkpoints()) == 1

    def test_a_tilde_is_the_home_folder(self, tmp_path, monkeypatch):
        """As a shell has it."""
        monkeypatch.setenv("HOME", str(tmp_path))
        assert Checkpointer("~/run").save_checkpoint(name="a").path == tmp_path / "run" / "CKPT+a"
