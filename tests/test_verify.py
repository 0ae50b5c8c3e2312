"""Verification: every byte of a folder, and what the command says and exits with."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
from contextlib import ExitStack

import pytest
import torch
from _foreign import forget_manifest
from click.testing import CliRunner

from lightning_sbckpt import Checkpointer, cli
from lightning_sbckpt import verify as verify_module
from lightning_sbckpt._io.storage import FileDigest, LocalStorage
from lightning_sbckpt._layout.annotations import annotate
from lightning_sbckpt._layout.manifest import Manifest, dump_manifest
from lightning_sbckpt.cli import _bars
from lightning_sbckpt.errors import CheckpointNotFoundError
from lightning_sbckpt.verify import verify


@pytest.fixture
def run(tmp_path, scale):
    """The folder of three checkpoints, a, b and c."""
    checkpointer = Checkpointer(tmp_path / "run", {"model": scale(1.0), "other": scale(2.0)})
    for name in "abc":
        checkpointer.save_checkpoint({"loss": 1.0}, name=name)
    return tmp_path / "run"


def flip(file):
    """Change one bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def statuses(path, **options):
    """Return what was found, by the last letter of the name."""
    return {found.path.name[-1]: found.status for found in verify(path, **options)}


class TestFolders:
    """What `verify` returns."""

    @pytest.mark.parametrize("workers", [1, 2, 5])
    def test_every_checkpoint_is_there_in_the_order_of_names(self, run, workers):
        """With its size, and nothing to say."""
        found = verify(run, workers=workers)
        assert [one.path for one in found] == [run / f"CKPT+{name}" for name in "abc"]
        for one in found:
            assert one.status == "sound"
            assert one.problems == one.annotation_problems == one.remarks == ()
            assert one.bytes == sum(file.stat().st_size for file in one.path.iterdir())

    def test_damage_is_found_wherever_it_is_and_all_of_it(self, run):
        """Several files of several checkpoints; files that no recoverable asks for, too."""
        flip(run / "CKPT+a" / "model.ckpt")
        (run / "CKPT+a" / "other.ckpt").unlink()
        flip(run / "CKPT+c" / "MANIFEST.yaml")
        a, b, c = verify(run)
        assert [one.status for one in (a, b, c)] == ["damaged", "sound", "damaged"]
        assert sorted(a.problems) == [
            "model.ckpt has other bytes than were written (checksum differs)",
            "other.ckpt is missing",
        ]
        (problem,) = c.problems
        assert "MANIFEST.yaml" in problem

    def test_a_checkpoint_that_lost_its_meta_is_damaged_although_nobody_lists_it(self, run):
        """It is none for every reader, and that is what has to be said."""
        (run / "CKPT+b" / "CKPT.yaml").unlink()
        assert len(Checkpointer(run).list_checkpoints()) == 2
        (b,) = [one for one in verify(run) if one.path.name == "CKPT+b"]
        assert b.problems == ("CKPT.yaml is missing",)

    def test_one_without_a_manifest_is_unverified_and_says_so(self, run):
        """As SpeechBrain's are; a torch file without its end and a meta that is none are found."""
        for name in "abc":
            forget_manifest(run / f"CKPT+{name}")
        model = run / "CKPT+b" / "model.ckpt"
        model.write_bytes(model.read_bytes()[:-20])
        (run / "CKPT+c" / "CKPT.yaml").write_text("- 1")
        a, b, c = verify(run)
        assert (a.status, a.verified) == ("unverified", False)
        assert "no MANIFEST.yaml" in a.remarks[0]
        assert "model.ckpt is cut off" in b.problems[0]
        assert "CKPT.yaml can't be read" in c.problems[0]

    def test_what_was_added_later_is_named_and_no_damage(self, run):
        """Files in folders, too."""
        shutil.copy(run / "CKPT+a" / "model.ckpt", run / "CKPT+a" / "teacher.ckpt")
        (run / "CKPT+a" / "notes").mkdir()
        (run / "CKPT+a" / "notes" / "mine.txt").write_text("mine")
        a = verify(run)[0]
        assert a.status == "sound"
        assert [remark.split(" was added later")[0] for remark in a.remarks] == [
            "notes/mine.txt",
            "teacher.ckpt",
        ]

    def test_damaged_annotations_are_told_and_make_no_damaged_checkpoint(self, run):
        """What was noted down later is beside what was saved."""
        for name in "ab":
            annotate(run / f"CKPT+{name}", {"wer": 0.5}, storage=LocalStorage())
        flip(run / "CKPT+a" / "ANNOTATIONS.yaml")
        a, b, c = verify(run)
        assert (a.status, a.problems) == ("sound", ())
        (problem,) = a.annotation_problems
        assert problem.startswith("ANNOTATIONS.yaml can't be used: ")
        assert b.annotation_problems == c.annotation_problems == ()
        assert a.remarks == b.remarks == ()
        result = CliRunner().invoke(cli.main, ["verify", str(run)])
        assert result.exit_code == 1
        assert "ANNOTATIONS.yaml can't be used" in result.stdout
        assert result.stdout.splitlines()[-1].startswith("3 sound: ")

    def test_one_checkpoint_may_be_named(self, run):
        """Damaged or not."""
        flip(run / "CKPT+b" / "other.ckpt")
        assert statuses(run / "CKPT+a") == {"a": "sound"}
        assert statuses(run / "CKPT+b") == {"b": "damaged"}

    def test_what_is_no_checkpoint_is_not_looked_at(self, run, tmp_path):
        """Foreign files, folders in the making or being removed, links to elsewhere."""
        (run / ".staging+x").mkdir()
        (run / ".staging+x" / "CKPT.yaml").write_text("half")
        (run / "CKPT+file").write_text("mine")
        (run / "CKPT+empty").mkdir()
        shutil.copytree(run / "CKPT+a", tmp_path / "CKPT+elsewhere")
        flip(tmp_path / "CKPT+elsewhere" / "model.ckpt")
        (run / "CKPT+link").symlink_to(tmp_path / "CKPT+elsewhere")
        assert statuses(run) == dict.fromkeys("abc", "sound")

    def test_an_empty_folder_has_none(self, tmp_path):
        """That is no error here."""
        assert verify(tmp_path) == []

    @pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("x")])
    def test_what_is_no_folder_is_refused(self, tmp_path, make):
        """With the path, and what may be named."""
        make(tmp_path / "there")
        with pytest.raises(CheckpointNotFoundError, match=r"there can't be verified.*or one check"):
            verify(tmp_path / "there")

    def test_nothing_is_changed(self, run, tree_bytes):
        """Not even where damage is found."""
        flip(run / "CKPT+b" / "other.ckpt")
        before = tree_bytes(run)
        verify(run)
        assert tree_bytes(run) == before


class TestMeanwhile:
    """Another process saves and prunes while a folder is verified."""

    @pytest.fixture
    def meanwhile(self, monkeypatch):
        """A function that has something done once, before the first file is read."""

        def arrange(action):
            real, begun = verify_module._digest, threading.Lock()

            def digest(path, *, tally):
                if begun.acquire(blocking=False):
                    action()
                return real(path, tally=tally)

            monkeypatch.setattr(verify_module, "_digest", digest)

        return arrange

    def test_a_checkpoint_that_vanishes_is_left_out(self, run, meanwhile):
        """It is gone, not damaged."""
        meanwhile(lambda: shutil.rmtree(run / "CKPT+b"))
        assert statuses(run) == {"a": "sound", "c": "sound"}

    def test_a_checkpoint_that_is_replaced_is_read_again(self, run, meanwhile, scale):
        """Its manifest was the old one's and its files are the new one's."""

        def replace():
            recoverables = {"model": scale(3.0), "other": scale(4.0)}
            Checkpointer(run, recoverables).save_checkpoint(name="c")

        meanwhile(replace)
        assert statuses(run, workers=1) == dict.fromkeys("abc", "sound")


class TestProgress:
    """How far it is."""

    def test_it_grows_to_all_bytes(self, run, monkeypatch):
        """In pieces, told by one thread at a time."""
        monkeypatch.setattr(verify_module, "_CHUNK", 512)
        told, inside = [], threading.Lock()

        def tell(done, total):
            assert inside.acquire(blocking=False)
            told.append((done, total))
            inside.release()

        found = verify(run, on_progress=tell)
        manifests = sum((one.path / "MANIFEST.yaml").stat().st_size for one in found)
        expected = sum(one.bytes for one in found) - manifests
        assert told[-1] == (expected, expected)
        assert len(told) > 15
        assert all(before < after for (before, _), (after, _) in itertools.pairwise(told))

    def test_the_bar_shows_only_after_a_while_and_goes_away(self, monkeypatch, capsys):
        """On a terminal."""
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        for patience, shown in ((100.0, False), (-1.0, True)):
            with ExitStack() as stack:
                tell = _bars.progress_bar(stack, "verifying", patience)
                tell(10, 1000)
                tell(500, 1000)
            text = capsys.readouterr().err
            assert ("500/1,000" in text or "500/1000" in text or "kB" in text) == shown

    def test_there_is_none_where_nobody_looks(self, monkeypatch, capsys):
        """In a log file it would be noise."""
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        with ExitStack() as stack:
            _bars.progress_bar(stack, "verifying", -1.0)(10, 1000)
        assert capsys.readouterr().err == ""


class TestCommand:
    """`lightning-sbckpt verify`."""

    def call(self, *args):
        return CliRunner().invoke(cli.main, ["verify", *map(str, args)])

    def test_a_sound_folder_exits_with_0(self, run):
        """A line for each, and a sum."""
        result = self.call(run)
        assert result.exit_code == 0
        *lines, total = result.stdout.splitlines()
        assert [line.split()[:2] for line in lines] == [["sound", f"CKPT+{n}"] for n in "abc"]
        assert total.startswith("3 sound: ")

    def test_damage_exits_with_1_and_is_named(self, run):
        """Beside what could not be verified."""
        flip(run / "CKPT+a" / "model.ckpt")
        forget_manifest(run / "CKPT+b")
        result = self.call(run)
        assert result.exit_code == 1
        assert "damaged     CKPT+a" in result.stdout
        assert "model.ckpt has other bytes" in result.stdout
        assert "unverified  CKPT+b" in result.stdout
        assert "1 sound, 1 damaged, 1 unverified: " in result.stdout.splitlines()[-1]

    def test_unverified_ones_alone_exit_with_0(self, run):
        """No damage was found."""
        for name in "abc":
            forget_manifest(run / f"CKPT+{name}")
        assert self.call(run).exit_code == 0

    def test_json_is_for_machines(self, run):
        """Nothing else on standard output."""
        flip(run / "CKPT+c" / "model.ckpt")
        result = self.call(run, "--json")
        assert result.exit_code == 1
        found = json.loads(result.stdout)
        assert [one["status"] for one in found] == ["sound", "sound", "damaged"]
        assert found[2]["path"] == str(run / "CKPT+c")
        assert found[2]["problems"] == [
            "model.ckpt has other bytes than were written (checksum differs)"
        ]
        assert {"bytes", "remarks", "annotation_problems"} <= set(found[0])

    @pytest.mark.parametrize("where", ["nowhere", "empty"])
    def test_what_holds_no_checkpoints_exits_with_2(self, tmp_path, where):
        """With the path, on standard error."""
        (tmp_path / "empty").mkdir()
        result = self.call(tmp_path / where)
        assert result.exit_code == 2
        assert where in result.stderr
        assert result.stdout == ""


def test_a_manifest_that_names_files_outside_reads_none_of_them(run):
    """Nor is it believed in anything else."""
    outside = run.parent / "outside"
    os.mkfifo(outside)  # Whoever opens it waits for ever.
    ckpt = run / "CKPT+a"
    for name in ("../../outside", str(outside), "x/../../../outside", "./model.ckpt", "a//b", ""):
        data = dump_manifest(Manifest({name: FileDigest(0, "0" * 32)}, {}))
        (ckpt / "MANIFEST.yaml").write_bytes(data)
        (problem,) = verify(ckpt)[0].problems
        assert f"{name!r} is no name of a file of this checkpoint" in problem


def test_large_files_are_read_in_pieces(tmp_path):
    """Not into memory: a sparse file of 2 GB would show."""
    saved = Checkpointer(tmp_path, {"w": torch.nn.Linear(1, 1)}).save_checkpoint()
    file = saved.paramfiles["w"]
    sizes = []
    os.truncate(file, 50 * 2**20)
    tally = verify_module._Tally(lambda done, total: sizes.append(done))
    with file.open("rb", buffering=0) as stream:
        found = verify_module._digest(stream, tally=tally)
    assert found.size == 50 * 2**20
    assert max(after - before for before, after in itertools.pairwise([0, *sizes])) <= 2**23
