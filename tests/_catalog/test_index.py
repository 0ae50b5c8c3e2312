"""Finding among many checkpoints: what is remembered, what is indexed, and when neither is trusted."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_sbckpt._catalog.catalog as catalog_module
import lightning_sbckpt._catalog.index as index_module
import lightning_sbckpt._layout.publish as layout_module
from lightning_sbckpt import Checkpointer
from lightning_sbckpt._catalog.catalog import Catalog
from lightning_sbckpt._catalog.index import INDEX_NAME, Entry, read_index, write_index
from lightning_sbckpt._io import records
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.annotations import annotate
from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.meta import Checkpoint, dump_meta
from lightning_sbckpt.selection import importance, rank_checkpoints, shortlist

LOWEST = importance(min_key="loss")
MANY = 70


def make(root, name, loss, files=("model", "optimizer"), **meta):
    """Make one checkpoint folder as SpeechBrain does."""
    folder = root / f"CKPT+{name}"
    folder.mkdir(parents=True)
    for file in files:
        (folder / f"{file}.ckpt").touch()
    described = {"unixtime": 1000.0 + loss, "end-of-epoch": True, "loss": loss, **meta}
    (folder / "CKPT.yaml").write_bytes(dump_meta(described))
    return folder


def make_many(root, count=MANY):
    for i in range(count):
        make(root, f"{i:03}", float(i))
    settle()


def settle():
    """Wait until every time in the folder is old enough to be trusted."""
    time.sleep(0.12)


def losses(catalog):
    return {ckpt.path.name[5:]: ckpt.meta.get("loss") for ckpt in catalog.checkpoints()}


@pytest.fixture
def no_reading(monkeypatch):
    """A function after which no checkpoint folder may be read; it returns how to count instead."""

    def forbid():
        def refuse(folder, **_):
            raise AssertionError(f"{folder} was read")

        monkeypatch.setattr(catalog_module, "read_folder", refuse)

    return forbid


@pytest.fixture
def reads(monkeypatch):
    """The names of the folders that were read."""
    names = []
    real = catalog_module.read_folder

    def count(folder, **options):
        names.append(Path(folder).name)
        return real(folder, **options)

    monkeypatch.setattr(catalog_module, "read_folder", count)
    return names


class TestAskedAgain:
    """What was read before counts only while nothing has changed."""

    def test_what_stays_is_not_read_again(self, tmp_path, no_reading):
        """Neither listed nor ranked."""
        make_many(tmp_path, 5)
        catalog = Catalog(tmp_path)
        first = catalog.checkpoints()
        no_reading()
        assert catalog.checkpoints() == first
        assert catalog.find(LOWEST, None, 1) == first[:1]

    def test_another_process_saves_removes_annotates_and_replaces(self, tmp_path):
        """Each is seen at the next question."""
        make_many(tmp_path, 5)
        catalog = Catalog(tmp_path)

        def best():
            (ckpt,) = catalog.find(LOWEST, None, 1)
            assert ckpt == min(catalog.checkpoints(), key=lambda ckpt: ckpt.meta["loss"])
            return ckpt.path.name[5:], ckpt.meta["loss"]

        def in_a_process(function, *arguments, **keywords):
            child = multiprocessing.get_context("fork").Process(
                target=function, args=arguments, kwargs=keywords
            )
            child.start()
            child.join()
            assert child.exitcode == 0

        assert best() == ("000", 0.0)
        in_a_process(make, tmp_path, "new", -1.0)
        assert best() == ("new", -1.0)
        in_a_process(annotate, tmp_path / "CKPT+003", {"loss": -3.0}, storage=LocalStorage())
        assert best() == ("003", -3.0)
        in_a_process(shutil.rmtree, tmp_path / "CKPT+003")
        assert best() == ("new", -1.0)
        in_a_process(replace, tmp_path, "002", -2.0)
        assert best() == ("002", -2.0)

    def test_a_meta_edited_by_hand(self, tmp_path):
        """Also by one that has the same size, and whose time is set back."""
        make_many(tmp_path, 3)
        catalog = Catalog(tmp_path)
        assert losses(catalog)["001"] == 1.0
        path = tmp_path / "CKPT+001" / "CKPT.yaml"
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_bytes(path.read_bytes().replace(b"loss: 1.0", b"loss: 8.0"))
        os.utime(path, ns=times)
        assert losses(catalog)["001"] == 8.0
        assert catalog.find(importance(max_key="loss"), None, 1)[0].path.name == "CKPT+001"

    def test_a_file_removed_by_hand(self, tmp_path):
        """The record doesn't promise what is gone."""
        make_many(tmp_path, 3)
        catalog = Catalog(tmp_path)
        assert set(catalog.find(LOWEST, None, 1)[0].paramfiles) == {"model", "optimizer"}
        (tmp_path / "CKPT+000" / "optimizer.ckpt").unlink()
        assert set(catalog.find(LOWEST, None, 1)[0].paramfiles) == {"model"}

    @pytest.mark.parametrize("tick", [10_000_000, 1_000_000_000, 2_000_000_000])
    def test_changes_within_one_tick_of_the_clock(self, tmp_path, monkeypatch, tick):
        """On a filesystem whose times are as coarse as that, where both have the same time."""
        real = catalog_module._identify

        def coarse(folder):
            found = list(real(folder))
            for place in (1, 2, 4, 5):
                found[place] -= found[place] % tick
            return tuple(found)

        monkeypatch.setattr(catalog_module, "_identify", coarse)
        path = make(tmp_path, "a", 0.0) / "CKPT.yaml"
        catalog = Catalog(tmp_path)
        for loss in range(1, 9):
            path.write_bytes(
                path.read_bytes().replace(b"loss: %d" % (loss - 1), b"loss: %d" % loss)
            )
            assert losses(catalog) == {"a": float(loss)}

    def test_an_unreadable_one_is_read_and_told_once(self, tmp_path, caplog, reads):
        """Until it changes; when it is well again it is listed."""
        path = make(tmp_path, "a", 0.0) / "CKPT.yaml"
        healthy = path.read_bytes()
        path.write_bytes(b"- no meta")
        settle()
        catalog = Catalog(tmp_path)
        for _ in range(3):
            assert catalog.checkpoints() == []
            assert list(catalog.unreadable) == [tmp_path / "CKPT+a"]
        assert len(caplog.records) == len(reads) == 1
        path.write_bytes(healthy)
        assert losses(catalog) == {"a": 0.0}
        assert catalog.unreadable == {}

    def test_what_a_caller_changes_does_not_come_back(self, tmp_path):
        """Neither in a list nor in what is found, nor nested."""
        make(tmp_path, "a", 1.0, matrix=[[1, 2]])
        settle()
        catalog = Catalog(tmp_path)
        for ask in (catalog.checkpoints, lambda: catalog.find(LOWEST, None, 1)):
            (ckpt,) = ask()
            ckpt.meta["loss"] = -5
            ckpt.meta["matrix"][0].append(3)
            ckpt.paramfiles.clear()
            (ckpt,) = ask()
            assert ckpt.meta["loss"] == 1.0 and ckpt.meta["matrix"] == [[1, 2]]
            assert set(ckpt.paramfiles) == {"model", "optimizer"}

    def test_what_is_in_a_store_is_asked_for_only_where_something_is(self, tmp_path, monkeypatch):
        """A record is looked for in the mirror of a store, and nowhere else."""
        asked = []
        real = layout_module.stored_files

        def count(folder):
            asked.append(Path(folder).name)
            return real(folder)

        monkeypatch.setattr(layout_module, "stored_files", count)
        make(tmp_path, "here", 1.0)
        assert losses(Catalog(tmp_path)) == {"here": 1.0}
        assert asked == []
        folder = make(tmp_path, "there", 2.0, files=())
        record = records.record_path(folder)
        record.parent.mkdir()
        stored = {"model.ckpt": records.Stored(7)}
        record.write_bytes(records.dump_record(records.identity(folder), stored))
        found = {ckpt.path.name: [*ckpt.paramfiles] for ckpt in Catalog(tmp_path).checkpoints()}
        assert found == {"CKPT+here": ["model", "optimizer"], "CKPT+there": ["model"]}
        assert sorted(asked) == ["CKPT+here", "CKPT+there"]

    def test_the_newest_time_reads_only_what_is_new(self, tmp_path, reads):
        """It is asked at every save."""
        make(tmp_path, "a", 1.0)
        catalog = Catalog(tmp_path)
        for _ in range(3):
            assert catalog.newest_time() == 1001.0
        make(tmp_path, "b", 5.0)
        assert catalog.newest_time() == 1005.0
        shutil.rmtree(tmp_path / "CKPT+b")
        assert catalog.newest_time() == 1001.0
        assert reads == ["CKPT+a", "CKPT+b"]


def replace(root, name, loss):
    """Put another checkpoint in the place of one, as a save under its own name does."""
    make(root / "beside", name, loss)
    (root / f"CKPT+{name}").rename(root / "gone")
    (root / "beside" / f"CKPT+{name}").rename(root / f"CKPT+{name}")


VALUES = st.none() | st.floats() | st.floats(0, 3).map(round).map(float) | st.integers(-3, 3)
METAS = st.lists(
    st.fixed_dictionaries(
        {}, optional={"loss": VALUES, "unixtime": VALUES, "acc": st.booleans() | st.just("word")}
    ),
    max_size=12,
)
FLOATS = st.floats() | st.floats(0, 3).map(round).map(float)
NUMBERS = st.lists(st.fixed_dictionaries({"loss": FLOATS, "unixtime": FLOATS}), max_size=8)
CRITERIA = [LOWEST, importance(max_key="loss"), importance(), importance(max_key="acc")]


@given(METAS | NUMBERS, st.sampled_from(CRITERIA), st.integers(0, 4))
@settings(max_examples=600, deadline=None, derandomize=True)
def test_the_short_list_holds_all_of_the_best(metas, criterion, limit):
    """Whatever the values; ranking it gives what ranking everything gives, errors too."""
    ckpts = [Checkpoint(Path(f"CKPT+{i}"), meta, {}) for i, meta in enumerate(metas)]
    values = [meta.get(criterion.key or "unixtime") for meta in metas]
    chosen = [ckpts[i] for i in shortlist(values, limit, lowest=criterion.lowest)]
    try:
        expected = [ckpt.path for ckpt in rank_checkpoints(ckpts, criterion, limit=limit)]
    except SelectionError:
        with pytest.raises(SelectionError):
            rank_checkpoints(chosen, criterion, limit=limit)
        return
    assert [ckpt.path for ckpt in rank_checkpoints(chosen, criterion, limit=limit)] == expected


def test_the_short_list_is_short():
    """Or it would be of no use."""
    assert len(shortlist([float(i % 50) for i in range(1000)], 1, lowest=True)) == 20
    assert shortlist([float(i) for i in range(1000)], 3, lowest=False) == [997, 998, 999]


class TestFind:
    """`find` gives what ranking the whole list gives."""

    @pytest.mark.parametrize("criterion", CRITERIA[:3], ids=lambda found: found.describe())
    def test_for_every_limit(self, tmp_path, criterion):
        """Smaller and larger ones in turn, since what was ranked is remembered."""
        for i, loss in enumerate([3.0, 1.0, math.nan, 1.0, 2.0, math.inf, 0.5]):
            make(tmp_path, f"{i}", loss, unixtime=float(i % 3))
        (make(tmp_path, "bare", 1.0) / "CKPT.yaml").write_bytes(b"unixtime: 7.0\n")
        settle()
        catalog = Catalog(tmp_path)
        for limit in (1, 3, 2, 0, None, 8, 9, 1):
            found = catalog.find(criterion, None, limit)
            ranked = rank_checkpoints(catalog.checkpoints(), criterion, limit=limit)
            assert [ckpt.path for ckpt in found] == [ckpt.path for ckpt in ranked]

    def test_predicates_and_functions_see_whole_records(self, tmp_path):
        """With their files."""
        make(tmp_path, "a", 1.0)
        make(tmp_path, "b", 2.0, files=("model",))
        catalog = Catalog(tmp_path)
        (found,) = catalog.find(LOWEST, lambda ckpt: len(ckpt.paramfiles) == 1, 1)
        assert found.path.name == "CKPT+b"
        (found,) = catalog.find(importance(importance_key=lambda c: len(c.paramfiles)), None, 1)
        assert found.path.name == "CKPT+a"

    def test_a_limit_that_can_not_be_meant(self, tmp_path):
        """Also when a larger one was answered before."""
        make(tmp_path, "a", 1.0)
        settle()
        catalog = Catalog(tmp_path)
        catalog.find(LOWEST, None, 5)
        with pytest.raises(SelectionError, match="Cannot return -1 checkpoints"):
            catalog.find(LOWEST, None, -1)

    def test_a_value_that_is_no_number_names_its_folder(self, tmp_path):
        """As ranking the list does."""
        make(tmp_path, "a", 1.0, stage="full")
        with pytest.raises(SelectionError, match=r"CKPT\+a by highest stage"):
            Catalog(tmp_path).find(importance(max_key="stage"), None, 1)


class TestTheIndex:
    """The next process reads one file instead of thousands, if nothing has changed."""

    def test_a_new_process_reads_no_folder(self, tmp_path, no_reading):
        """And finds the same records."""
        make_many(tmp_path)
        first = Catalog(tmp_path).checkpoints()
        no_reading()
        assert Catalog(tmp_path).checkpoints() == first
        assert Catalog(tmp_path).find(LOWEST, None, 2) == first[:2]
        assert Catalog(tmp_path).newest_time() == 1000.0 + MANY - 1
        assert first[0].paramfiles["model"] == tmp_path / "CKPT+000" / "model.ckpt"

    @pytest.mark.parametrize(("count", "keep"), [(MANY, False), (60, True)])
    def test_none_is_written(self, tmp_path, count, keep):
        """For a small folder, and where it isn't wanted."""
        make_many(tmp_path, count)
        Catalog(tmp_path, keep_index=keep).checkpoints()
        assert not (tmp_path / INDEX_NAME).exists()

    def test_young_checkpoints_are_left_out(self, tmp_path, reads, monkeypatch):
        """Until their times say that nothing came after."""
        make_many(tmp_path)
        made = (make(tmp_path, "young", -1.0) / "CKPT.yaml").stat().st_ctime_ns
        # However long it takes from here on: no time passes, or it would be old enough, too.
        monkeypatch.setattr(catalog_module.time, "time_ns", lambda: made)
        Catalog(tmp_path).checkpoints()
        reads.clear()
        assert Catalog(tmp_path).find(LOWEST, None, 1)[0].path.name == "CKPT+young"
        assert reads == ["CKPT+young"]

    def test_it_is_not_written_again_for_a_few(self, tmp_path):
        """Reading a few folders is cheaper than writing all of them down; for many it is."""
        make_many(tmp_path)
        Catalog(tmp_path).checkpoints()
        before = (tmp_path / INDEX_NAME).stat()
        for i in range(40):
            make(tmp_path, f"later{i}", 1.0)
            if i == 10:
                settle()
                Catalog(tmp_path).checkpoints()
                assert (tmp_path / INDEX_NAME).stat().st_ino == before.st_ino
        settle()
        Catalog(tmp_path).checkpoints()
        assert (tmp_path / INDEX_NAME).stat().st_ino != before.st_ino

    @pytest.mark.parametrize("seed", range(4))
    def test_whatever_changes_between_two_processes(self, tmp_path, seed):
        """A catalog with the index and one that reads everything agree, after every change."""
        make_many(tmp_path)
        draw = random.Random(seed)
        for turn in range(12):
            folder = tmp_path / f"CKPT+{draw.randrange(MANY):03}"
            change = draw.choice(["edit", "annotate", "remove", "add", "file", "time", "settle"])
            if change == "add":
                make(tmp_path, f"new{turn}", draw.random())
            elif change == "settle":
                settle()
            elif folder.exists():
                if change == "edit":
                    path = folder / "CKPT.yaml"
                    path.write_bytes(path.read_bytes().replace(b"true", b"fals").replace(b"fals\n", b"true\n") + b"x: %d\n" % turn)  # fmt: skip
                elif change == "annotate":
                    annotate(folder, {"loss": draw.random()}, storage=LocalStorage())
                elif change == "remove":
                    shutil.rmtree(folder)
                elif change == "file":
                    (folder / f"extra{turn}.ckpt").touch()
                else:
                    os.utime(folder / "CKPT.yaml", (1, 1))
            indexed = Catalog(tmp_path).checkpoints()
            (tmp_path / INDEX_NAME).rename(tmp_path / "aside")
            assert indexed == Catalog(tmp_path, keep_index=False).checkpoints()
            (tmp_path / "aside").rename(tmp_path / INDEX_NAME)

    def test_a_copied_folder_is_read_anew(self, tmp_path, reads):
        """The index came along, and is about other inodes."""
        make_many(tmp_path / "run")
        first = Catalog(tmp_path / "run").checkpoints()
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        settle()
        reads.clear()
        copied = Catalog(tmp_path / "copy").checkpoints()
        assert len(reads) == MANY
        assert [ckpt.meta for ckpt in copied] == [ckpt.meta for ckpt in first]
        assert copied[0].path.parent == tmp_path / "copy"

    def test_speechbrain_does_not_see_it(self, tmp_path, speechbrain):
        """Neither as a checkpoint nor as a reason to fail."""
        make_many(tmp_path)
        Catalog(tmp_path).checkpoints()
        assert (tmp_path / INDEX_NAME).exists()
        theirs = speechbrain.utils.checkpoints.Checkpointer(tmp_path)
        assert len(theirs.list_checkpoints()) == MANY

    def test_a_folder_that_can_not_be_written_to(self, tmp_path, monkeypatch, caplog):
        """It is read all the same, without a word."""

        def read_only(path, flags, *mode):
            raise OSError(30, "Read-only file system", path)

        make_many(tmp_path)
        monkeypatch.setattr(index_module.os, "open", read_only)
        monkeypatch.setattr(catalog_module, "read_folder", lambda folder, **_: ({"loss": 1.0}, []))
        assert len(Catalog(tmp_path).checkpoints()) == MANY
        assert [r for r in caplog.records if r.levelname != "DEBUG"] == []
        assert not (tmp_path / INDEX_NAME).exists()

    def test_meta_that_json_can_not_give_back_is_read_from_its_folder(self, tmp_path, reads):
        """Tensors, nested values, dates, and too much of anything."""
        make_many(tmp_path)
        make(tmp_path, "tensor", 1.0, t=torch.tensor([1.0, 2.0]))
        make(tmp_path, "nested", 1.0, d={"a": [1]})
        for name, text in (
            ("date", "d: 2026-11-22\n"),
            ("key", "loss: 1.0\n5: number\n"),
            ("bomb", "a: &a " + "x" * 1000 + "\n" + "".join(f"b{i}: *a\n" for i in range(200))),
        ):
            (make(tmp_path, name, 1.0) / "CKPT.yaml").write_text(text)
        settle()
        first = [repr(ckpt) for ckpt in Catalog(tmp_path).checkpoints()]
        reads.clear()
        assert [repr(ckpt) for ckpt in Catalog(tmp_path).checkpoints()] == first
        # A key that is no word is taken by its text, which the index holds.
        assert sorted(reads) == [f"CKPT+{n}" for n in ("bomb", "date", "nested", "tensor")]
        assert (tmp_path / INDEX_NAME).stat().st_size < 50_000

    def test_numbers_come_back_as_they_were(self, tmp_path):
        """Not a number, infinite, large, nothing, and what only looks like one."""
        meta = {
            "a": math.inf,
            "b": -math.inf,
            "c": 2**70,
            "d": None,
            "e": True,
            "f": 1,
            "g": 1.0,
            "h": 0.1,
            "i": "1",
            "j": "ü\ud800\u2028",
            "k": [1, "x", None],
            "l": -0.0,
            "m": math.nan,
        }
        entry = Entry((1, 2, 3, 4, 5, 6, 7), meta, ["model", "rng"])
        assert write_index(tmp_path, {"CKPT+a": entry})
        ((identity, kind, place),) = read_index(tmp_path).values()
        assert repr(kind.meta(place)) == repr(meta)
        assert (identity, kind.names) == (entry.identity, entry.names)


def signed(body):
    """Return an index with a right checksum around whatever body."""
    return json.dumps(index_module._header(body)).encode() + b"\n" + body


def altered(data, place, value):
    """Return an index with another part in its only kind: names, keys, folders, ..."""
    (kind,) = json.loads(data.partition(b"\n")[2])
    kind[place] = value(kind[place]) if callable(value) else value
    return signed(json.dumps([kind]).encode())


def other_format(data):
    first, _, body = data.partition(b"\n")
    return first.replace(b'"format": 1', b'"format": 2') + b"\n" + body


SPOILT = {
    "empty": lambda data: b"",
    "torn": lambda data: data[: len(data) // 2],
    "torn by a byte": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "flipped": lambda data: data.replace(b"10.0", b"-9.0", 1),
    "binary": lambda data: bytes(range(256)) * 10,
    "another format": other_format,
    "pickle": lambda data: b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94\x8c\x02ls\x94\x85R.",
    "a number": lambda data: signed(b"5"),
    "an object": lambda data: signed(b"{}"),
    "deep": lambda data: signed(b"[" * 100_000),
    "a kind of one": lambda data: signed(b"[[1]]"),
    "a kind that is a number": lambda data: signed(b"[1]"),
    "names of numbers": lambda data: altered(data, 0, [1, 2]),
    "names that are one": lambda data: altered(data, 0, "model"),
    "names out of the folder": lambda data: altered(data, 0, ["../../elsewhere"]),
    "keys of numbers": lambda data: altered(data, 1, [1, 2, 3]),
    "fewer keys": lambda data: altered(data, 1, ["loss"]),
    "folders of numbers": lambda data: altered(data, 2, [1] * MANY),
    "fewer folders": lambda data: altered(data, 2, ["CKPT+000"]),
    "identities of half": lambda data: altered(data, 3, lambda text: text[: len(text) // 2]),
    "identities cut off": lambda data: altered(data, 3, lambda text: text[:-2]),
    "identities of letters": lambda data: altered(data, 3, "xyz"),
    "identities of numbers": lambda data: altered(data, 3, 5),
    "values of numbers": lambda data: altered(data, 4, [5] * 3),
    "values that are words": lambda data: altered(data, 4, ["x" * MANY] * 3),
    "more identities": lambda data: altered(data, 3, lambda text: text + text[:112]),
    "fewer values": lambda data: altered(data, 4, lambda columns: [c[:-1] for c in columns]),
    "no values": lambda data: altered(data, 4, []),
}


class TestASpoiltIndex:
    """It is ignored, and replaced when there is reason to."""

    @pytest.mark.sample(10)
    @pytest.mark.parametrize("kind", SPOILT)
    def test_the_folders_are_read(self, tmp_path, reads, caplog, kind):
        """As if there were none, without a word; and the next process has a good one."""
        make_many(tmp_path)
        first = Catalog(tmp_path).checkpoints()
        index = tmp_path / INDEX_NAME
        index.write_bytes(SPOILT[kind](index.read_bytes()))
        reads.clear()
        assert Catalog(tmp_path).checkpoints() == first
        assert len(reads) == MANY
        assert Catalog(tmp_path).checkpoints() == first
        assert len(reads) == MANY
        assert [r for r in caplog.records if r.levelname != "DEBUG"] == []

    @pytest.mark.parametrize("kind", ["pipe", "folder", "link", "dangling link"])
    @pytest.mark.parametrize("name", [INDEX_NAME, f"{INDEX_NAME}.new"])
    def test_what_is_no_file_is_neither_waited_for_nor_followed(self, tmp_path, kind, name):
        """In its place, or in the place where the next one is written."""
        root = tmp_path / "run"
        make_many(root)
        first = Catalog(root, keep_index=False).checkpoints()
        precious = tmp_path / "precious"
        if kind == "link":
            precious.write_text("precious")
        if kind == "pipe":
            os.mkfifo(root / name)
        elif kind == "folder":
            (root / name).mkdir()
        else:
            (root / name).symlink_to(precious)
        for _ in range(2):
            assert Catalog(root).checkpoints() == first
        assert precious.exists() == (kind == "link")
        if kind == "link":
            assert precious.read_text() == "precious"

    def test_a_file_that_has_a_second_name_is_not_written_to(self, tmp_path):
        """It may be somebody's."""
        root = tmp_path / "run"
        make_many(root)
        (tmp_path / "precious").write_text("precious")
        os.link(tmp_path / "precious", root / f"{INDEX_NAME}.new")
        assert len(Catalog(root).checkpoints()) == MANY
        assert (tmp_path / "precious").read_text() == "precious"

    def test_what_a_killed_process_left_is_taken_over(self, tmp_path):
        """Nothing has to be cleared by hand."""
        make_many(tmp_path)
        beside = tmp_path / f"{INDEX_NAME}.new"
        beside.write_bytes(b"x" * 100_000)
        Catalog(tmp_path).checkpoints()
        assert not beside.exists()
        assert read_index(tmp_path)

    def test_it_is_left_alone_while_another_process_writes_it(self, tmp_path):
        """There is time enough for it later."""
        entries = {"CKPT+a": Entry((1,) * 7, {"x": 1}, [])}
        with (tmp_path / f"{INDEX_NAME}.new").open("wb") as stream:
            index_module.fcntl.flock(stream, index_module.fcntl.LOCK_EX)
            assert not write_index(tmp_path, entries)
        assert write_index(tmp_path, entries)

    def test_one_too_large_is_not_written(self, tmp_path, monkeypatch):
        """Since it would not be read."""
        monkeypatch.setattr(index_module, "_MAX_BYTES", 100)
        assert not write_index(tmp_path, {"CKPT+a": Entry((1,) * 7, {"x": 1}, [])})
        assert list(tmp_path.iterdir()) == []


def look_many_times(root, seed):
    draw = random.Random(seed)
    for turn in range(15):
        if draw.random() < 0.3:
            (root / INDEX_NAME).unlink(missing_ok=True)
        (best,) = Catalog(root).find(LOWEST, None, 1)
        assert best.meta["loss"] == 0.0
        assert len(Catalog(root).checkpoints()) >= MANY
        make(root, f"{seed}x{turn}", 5.0)


def test_several_processes_look_write_and_add_at_once(tmp_path):
    """All find what is there, and the index is good in the end."""
    make_many(tmp_path)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=look_many_times, args=(tmp_path, i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    settle()
    assert len(Catalog(tmp_path).checkpoints()) == MANY + 60
    (tmp_path / INDEX_NAME).unlink(missing_ok=True)
    Catalog(tmp_path).checkpoints()
    assert len(read_index(tmp_path)) == MANY + 60


def test_twenty_thousand_other_entries_cost_little(tmp_path):
    """Files, and folders that are no checkpoints although they are named like one."""
    for i in range(10_000):
        (tmp_path / f"file{i}").touch()
        (tmp_path / f"CKPT+{i}").mkdir()
    make(tmp_path, "real", 1.0)
    checkpointer = Checkpointer(tmp_path)
    start = time.process_time()
    assert [ckpt.path.name for ckpt in checkpointer.list_checkpoints()] == ["CKPT+real"]
    assert time.process_time() - start < 1.0
