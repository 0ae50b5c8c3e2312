"""A `Checkpointer` on a URL does what one on a folder does, from whatever machine."""

from __future__ import annotations

import logging

import pytest
import torch

from lightning_sbckpt import Checkpointer, Pretrainer, average_checkpoints
from lightning_sbckpt._layout.history import read_history
from lightning_sbckpt._remote.folder import RemoteFolder
from lightning_sbckpt.averaging import save_average
from lightning_sbckpt.difference import diff
from lightning_sbckpt.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    RemoteError,
    SaveError,
)
from lightning_sbckpt.export import to_state_dict
from lightning_sbckpt.folder import CheckpointFolder
from lightning_sbckpt.verify import verify
from remote._machines import Machines, filled


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def machines(place, tmp_path):
    return Machines(*place, tmp_path)


@pytest.mark.sample(2)
def test_what_one_machine_saves_another_finds_ranks_and_loads(machines):
    """Nothing but the URL is known to both."""
    first = machines.another({"model": filled(1.0)})
    assert first.recover_if_possible() is None
    for value, loss in ((1.0, 0.5), (2.0, 0.25), (3.0, 0.75)):
        first.recoverables["model"] = filled(value)
        first.save_checkpoint({"loss": loss})
    second = machines.another()
    assert [ckpt.meta["loss"] for ckpt in second.list_checkpoints()] == [0.5, 0.25, 0.75]
    assert second.find_checkpoint(min_key="loss").meta["loss"] == 0.25
    assert second.recover_if_possible(min_key="loss").meta["loss"] == 0.25
    assert torch.equal(second.recoverables["model"].bias, torch.full((400,), 2.0))
    assert second.find_checkpoint().open("model")["bias"][0] == 3.0


def test_the_local_folder_and_the_url_are_both_told(machines, tmp_path):
    """The folder is where files are read from, the URL is what the checkpoint is called by."""
    checkpointer = machines.another(local_dir=tmp_path / "here")
    assert checkpointer.checkpoints_dir == tmp_path / "here"
    assert checkpointer.url == machines.url
    assert Checkpointer(tmp_path / "plain").url is None


def test_only_the_files_that_are_asked_for_are_brought(machines):
    """The optimizer's state, twice as large as the model, stays in the store."""
    machines.another({"model": filled(1.0), "optimizer": filled(2.0)}).save_checkpoint(name="a")
    second = machines.another()
    found = second.find_checkpoint()
    assert sorted(found.paramfiles) == ["model", "optimizer"]
    assert not any(path.exists() for path in found.paramfiles.values())
    second.recover_if_possible()
    assert found.paramfiles["model"].exists()
    assert not found.paramfiles["optimizer"].exists()


@pytest.mark.sample(2)
def test_the_best_and_the_newest_of_a_url_are_taken_wherever_a_checkpoint_is(machines, tmp_path):
    """As behind the path of a run: loading, averages, exports, files of a pretrainer."""
    first = machines.another()
    for value, loss in ((1.0, 0.25), (2.0, 0.5)):
        first.recoverables["model"] = filled(value)
        first.save_and_keep_only({"loss": loss}, min_keys=["loss"], num_to_keep=2)
    second = machines.another({"model": filled(0.0)})
    second.list_checkpoints()
    for word, value in (("best", 1.0), ("newest", 2.0)):
        url = f"{machines.url}/{word}"
        second.load_checkpoint(url)
        assert second.recoverables["model"].bias[0] == value
        assert average_checkpoints([url], "model")["bias"][0] == value
        to_state_dict(url, tmp_path / f"{word}.pt")
        assert torch.load(tmp_path / f"{word}.pt")["bias"][0] == value
        loaded = filled(0.0)
        pretrainer = Pretrainer(
            tmp_path / word, loadables={"model": loaded}, paths={"model": f"{url}/model.ckpt"}
        )
        pretrainer.collect_files()
        pretrainer.load_collected()
        assert loaded.bias[0] == value


def test_a_checkpoint_is_loaded_by_its_url(machines):
    """As by the path of its folder."""
    machines.another({"model": filled(4.0)}).save_checkpoint(name="a")
    second = machines.another()
    second.load_checkpoint(f"{machines.url}/CKPT+a")
    assert second.recoverables["model"].bias[0] == 4.0
    with pytest.raises(CheckpointNotFoundError, match=r"CKPT\+b is not a checkpoint"):
        second.load_checkpoint(f"{machines.url}/CKPT+b")


def test_retention_removes_from_the_store_and_says_why(machines, caplog):
    """Another machine sees what is left, and the reasons are in the history that it reads."""
    first = machines.another()
    with caplog.at_level(logging.INFO):
        for loss in (0.5, 0.25, 0.75):
            first.save_and_keep_only({"loss": loss}, min_keys=["loss"])
    assert "removed" in caplog.text
    assert "not among the 1 best loss, older than the newest 1" in caplog.text
    second = machines.another()
    assert [ckpt.meta["loss"] for ckpt in second.list_checkpoints()] == [0.25, 0.75]
    assert {name.partition("/")[0] for name in machines.objects()} == {
        "HISTORY.jsonl",
        *(ckpt.path.name for ckpt in second.list_checkpoints()),
    }
    gone = [life for life in second.timeline().lives if life.state == "removed"]
    assert [life.reason for life in gone] == ["not among the 1 best loss, older than the newest 1"]


def test_the_history_is_there_after_every_save(machines):
    """Not only when something was removed."""
    machines.another().save_checkpoint(name="a")
    (event,) = read_history(tell_all(machines.another(access="read")))
    assert (event["event"], event["name"]) == ("saved", "CKPT+a")


def tell_all(checkpointer):
    checkpointer.list_checkpoints()
    return checkpointer.checkpoints_dir


def test_the_store_is_listed_once_for_each_retention(machines, monkeypatch):
    """And not at all where it is said that what is known will do."""
    asked = []
    listing = RemoteFolder.listing
    monkeypatch.setattr(
        RemoteFolder, "listing", lambda self: asked.append(self.url) or listing(self)
    )
    checkpointer = machines.another()
    assert len(asked) == 1
    for _ in range(3):
        checkpointer.save_and_keep_only()
    assert len(asked) == 4
    with checkpointer.one_look():
        checkpointer.list_checkpoints()
        checkpointer.find_checkpoint()
    assert len(asked) == 5
    with checkpointer.as_known():
        assert len(checkpointer.list_checkpoints()) == 1
    assert len(asked) == 5


@pytest.mark.sample(2)
def test_what_another_machine_removes_and_replaces_is_seen(machines):
    """Between two looks, with nothing told to this one."""
    first, second = machines.another(), machines.another()
    for name in "ab":
        first.save_checkpoint({"mark": 1}, name=name)
    assert [ckpt.meta["mark"] for ckpt in second.list_checkpoints()] == [1, 1]
    second.load_checkpoint(f"{machines.url}/CKPT+a")
    first.recoverables["model"] = filled(5.0)
    first.save_checkpoint({"mark": 2}, name="a")
    first.delete_checkpoints(ckpt_predicate="mark == 1", num_to_keep=0)
    (left,) = second.list_checkpoints()
    assert (left.path.name, left.meta["mark"]) == ("CKPT+a", 2)
    # The file of before does not stand for the one of now.
    second.recover_if_possible()
    assert second.recoverables["model"].bias[0] == 5.0
    assert not (second.checkpoints_dir / "CKPT+b").exists()


def test_one_saved_again_under_its_name_is_not_taken_for_the_one_in_the_store(
    machines, monkeypatch, tmp_path
):
    """When its upload failed: what is here is the newer one, and goes up at the next start."""
    first = machines.another({"model": filled(1.0)}, local_dir=tmp_path / "here")
    first.save_checkpoint(name="a")
    first.recoverables["model"] = filled(2.0)

    def fail(self, *args, **kwargs):
        raise RemoteError("the server went away")

    with monkeypatch.context() as context:
        context.setattr(RemoteFolder, "publish", fail)
        with pytest.raises(SaveError, match="the server went away"):
            first.save_checkpoint(name="a")
    first.release()
    again = machines.another(local_dir=tmp_path / "here")
    again.recover_if_possible()
    assert again.recoverables["model"].bias[0] == 2.0
    again.claim()
    other = machines.another()
    other.recover_if_possible()
    assert other.recoverables["model"].bias[0] == 2.0


def test_pins_and_annotations_are_seen_by_every_machine(machines):
    """Also one of the same length as the one before it, and retention minds them at once."""
    first, second = machines.another(), machines.another()
    for name in "abc":
        first.save_checkpoint(name=name)
    first.list_checkpoints()
    second.pin(second.list_checkpoints()[0], "x")
    assert first.list_checkpoints()[0].meta["pinned"] == "x"
    second.pin(second.list_checkpoints()[0], "y")
    second.annotate(second.list_checkpoints()[1], {"bleu": 31.5}, note="good")
    assert first.list_checkpoints()[0].meta["pinned"] == "y"
    assert first.find_checkpoint(max_key="bleu").path.name == "CKPT+b"
    assert [each.keep for each in first.delete_checkpoints()] == [True, False, True]
    first.unpin(f"{machines.url}/CKPT+a")
    assert "pinned" not in second.list_checkpoints()[0].meta


def test_a_pin_set_while_a_checkpoint_is_uploaded_is_not_lost(machines, monkeypatch):
    """Its file came too late to be among those that go up."""
    checkpointer = machines.another()
    compare = RemoteFolder._compare

    def pin_meanwhile(self, name, sizes):
        monkeypatch.setattr(RemoteFolder, "_compare", compare)
        CheckpointFolder(checkpointer.checkpoints_dir, access="shared").pin(
            checkpointer.checkpoints_dir / name, "meanwhile"
        )
        compare(self, name, sizes)

    monkeypatch.setattr(RemoteFolder, "_compare", pin_meanwhile)
    checkpointer.save_checkpoint(name="a")
    for each in (checkpointer, machines.another()):
        assert each.find_checkpoint().meta["pinned"] == "meanwhile"


class SecondRank:
    """A world in which rank zero, on another machine, has decided."""

    rank, size = 1, 2

    def __init__(self, decided):
        self.decided = decided

    def broadcast(self, obj):
        return self.decided


def test_what_rank_zero_found_another_machine_reads_from_its_own_folder(machines):
    """The record names a path of rank zero's machine."""
    first = machines.another({"model": filled(5.0)})
    first.save_checkpoint(name="a")
    second = machines.another(access="read", world=SecondRank(first.find_sound_checkpoint()))
    found = second.find_sound_checkpoint()
    assert found.path == second.checkpoints_dir / "CKPT+a"
    # Only rank zero has looked into the files, and a hook of the user reads by a path alone.
    read = []
    second.add_recoverable(
        "model", object(), custom_load_hook=lambda obj, path, _: read.append(path.stat().st_size)
    )
    second.recover_if_possible()
    assert read[0] > 600_000
    second = machines.another(access="read")
    second.load_checkpoint(found)
    assert second.recoverables["model"].bias[0] == 5.0


def test_a_card_of_a_checkpoint_has_the_files_that_are_in_the_store(machines):
    """None of them is said to be missing."""
    machines.another().save_checkpoint(name="a")
    (found,) = machines.another(access="read").list_checkpoints()
    card = found._repr_html_()
    assert "model.ckpt" in card
    assert "missing" not in card


@pytest.mark.sample(1)
def test_verify_reads_what_is_in_the_store_and_keeps_nothing_of_it(machines):
    """A byte that flips over there is found, although the copy here is sound."""
    first = machines.another()
    for name in "ab":
        first.save_checkpoint(name=name)
    assert [found.status for found in verify(first.checkpoints_dir)] == ["sound", "sound"]
    machines.flip_a_byte("CKPT+b/model.ckpt")
    second = machines.another(access="read")
    second.list_checkpoints()
    found = verify(second.checkpoints_dir)
    assert [one.status for one in found] == ["sound", "damaged"]
    assert found[1].problems == ("model.ckpt has other bytes than were written (checksum differs)",)
    assert not list(second.checkpoints_dir.rglob("*.ckpt"))
    assert [one.status for one in verify(first.checkpoints_dir)] == ["sound", "damaged"]


def test_recovery_steps_over_what_is_damaged_in_the_store(machines, caplog):
    """With a line that names it."""
    first = machines.another({"model": filled(1.0)})
    first.save_checkpoint(name="a")
    first.save_checkpoint(name="b")
    machines.put("CKPT+b/model.ckpt", b"short")
    second = machines.another()
    assert second.recover_if_possible().path.name == "CKPT+a"
    assert "skipped a damaged checkpoint, CKPT+b" in caplog.text


def test_a_copy_that_was_damaged_here_is_brought_again(machines):
    """The store has the sound one."""
    machines.another({"model": filled(6.0)}).save_checkpoint(name="a")
    second = machines.another()
    path = second.recover_if_possible().paramfiles["model"]
    data = bytearray(path.read_bytes())
    data[-40_000] ^= 1
    path.write_bytes(data)
    second.recoverables["model"] = filled(0.0)
    assert second.recover_if_possible().path.name == "CKPT+a"
    assert second.recoverables["model"].weight.eq(6.0).all()


def test_large_files_of_older_checkpoints_make_room_here(machines):
    """They are in the store; the newest stays for the next save to share its bytes with."""
    checkpointer = machines.another()
    for name in "abc":
        checkpointer.save_checkpoint(name=name)
    there = sorted(path.parent.name for path in checkpointer.checkpoints_dir.rglob("*.ckpt"))
    assert there == ["CKPT+c"]
    assert [sorted(ckpt.paramfiles) for ckpt in checkpointer.list_checkpoints()] == [["model"]] * 3
    checkpointer.recoverables["model"] = filled(9.0)
    checkpointer.load_checkpoint(f"{machines.url}/CKPT+a")
    assert checkpointer.recoverables["model"].bias[0] == 0.0
    # What was read is kept until the next start.
    there = sorted(path.parent.name for path in checkpointer.checkpoints_dir.rglob("*.ckpt"))
    assert there == ["CKPT+a", "CKPT+c"]
    checkpointer.release()
    machines.another(local_dir=checkpointer.checkpoints_dir).claim()
    there = sorted(path.parent.name for path in checkpointer.checkpoints_dir.rglob("*.ckpt"))
    assert there == ["CKPT+c"]


def test_a_file_that_has_not_changed_is_copied_within_the_store(machines, monkeypatch):
    """Its bytes don't go over the network again, and it is a file of its own there."""
    copied = []
    copy = RemoteFolder._copied
    monkeypatch.setattr(
        RemoteFolder,
        "_copied",
        lambda self, name, file, other: (
            copied.append((name, file, other)) or copy(self, name, file, other)
        ),
    )
    frozen, model = filled(1.0), filled(2.0)
    checkpointer = machines.another({"frozen": frozen, "model": model})
    checkpointer.save_checkpoint(name="a")
    torch.nn.init.zeros_(model.weight)
    checkpointer.save_checkpoint(name="b")
    assert copied == [("CKPT+b", "frozen.ckpt", "CKPT+a")]
    checkpointer.delete_checkpoints()
    second = machines.another({"frozen": filled(0.0), "model": filled(1.0)})
    second.recover_if_possible()
    assert second.recoverables["frozen"].bias[0] == 1.0
    assert second.recoverables["model"].weight.eq(0.0).all()


def test_a_budget_counts_what_checkpoints_take_in_the_store(machines):
    """Also of those whose files are not here."""
    from lightning_sbckpt.retention import Budget, Newest

    checkpointer = machines.another()
    for name in "abcd":
        checkpointer.save_checkpoint(name=name)
    # Each has 640 kB.
    kept = checkpointer.apply_retention([Newest(4), Budget("1.5 MB")], dry_run=True)
    assert sorted(each.checkpoint.path.name for each in kept if each.keep) == ["CKPT+c", "CKPT+d"]


@pytest.mark.sample(2)
def test_checkpoints_of_a_url_are_averaged_and_compared(machines):
    """By their URLs and by their records; what is needed is brought."""
    first = machines.another({"model": filled(1.0)})
    first.save_checkpoint(name="a")
    first.recoverables["model"] = filled(3.0)
    first.save_checkpoint(name="b")
    second = machines.another(access="read")
    ckpts = second.list_checkpoints()
    assert average_checkpoints(ckpts, "model")["bias"][0] == 2.0
    third = machines.another(access="read")
    assert not diff(*third.list_checkpoints()).equal
    saved = save_average(first, first.list_checkpoints(), name="mean")
    assert saved.meta["pinned"]
    assert "CKPT+mean/ANNOTATIONS.yaml" in machines.objects()
    fourth = machines.another(access="read")
    names = [ckpt.path.name for ckpt in fourth.list_checkpoints()]
    assert names == ["CKPT+a", "CKPT+b", "CKPT+mean"]
    by_url = average_checkpoints([fourth.checkpoints_dir / "CKPT+mean"], "model")
    assert by_url["bias"][0] == 2.0


def test_in_the_background_it_is_uploaded_when_wait_returns(machines):
    """And not only written here."""
    with machines.another(save_mode="async") as checkpointer:
        checkpointer.save_checkpoint(name="a")
        checkpointer.wait()
        assert [ckpt.path.name for ckpt in machines.another().list_checkpoints()] == ["CKPT+a"]


def test_reading_changes_nothing_in_the_store(machines):
    """Neither objects nor their bytes, whatever is read."""
    machines.another().save_checkpoint(name="a")
    before = machines.objects()
    reader = machines.another(access="read")
    reader.recover_if_possible()
    verify(reader.checkpoints_dir)
    assert machines.objects() == before


def test_what_only_urls_have_is_refused_for_a_folder(tmp_path):
    """Rather than ignored."""
    with pytest.raises(ConfigurationError, match=r"local_dir is for the URL of a store"):
        Checkpointer(tmp_path / "run", local_dir=tmp_path / "here")
    with pytest.raises(ConfigurationError, match=r"storage_options is for the URL of a store"):
        Checkpointer(tmp_path / "run", storage_options={"key": "k"})


def test_a_local_folder_is_the_mirror_of_one_url_and_of_nothing_else(machines, tmp_path):
    """Checkpoints that are there already would be uploaded, or taken for gone."""
    Checkpointer(tmp_path / "run", {"model": filled(1.0)}).save_checkpoint()
    with pytest.raises(ConfigurationError, match=r"there are checkpoints in it already"):
        machines.another(local_dir=tmp_path / "run")
    machines.another(local_dir=tmp_path / "here").save_checkpoint()
    with pytest.raises(ConfigurationError, match=rf"it holds those of {machines.url}"):
        Checkpointer("memory://other/run", local_dir=tmp_path / "here")


def test_a_file_url_is_its_path(tmp_path):
    """No store is between."""
    checkpointer = Checkpointer(f"file://{tmp_path}/run")
    checkpointer.save_checkpoint(name="a")
    assert checkpointer.url is None
    assert (tmp_path / "run" / "CKPT+a" / "CKPT.yaml").exists()
