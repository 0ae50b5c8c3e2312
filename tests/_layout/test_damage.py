"""Damage is found, stepped over, and never loaded."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil

import pytest
import torch
import xxhash
import yaml
from _counts import count
from _foreign import forget_manifest

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._layout import manifest as manifest_module
from lightning_sbckpt._layout.manifest import _checksum_line, find_damage
from lightning_sbckpt.errors import DamagedCheckpointError
from lightning_sbckpt.verify import verify

FILES = ["model.ckpt", "optimizer.ckpt", "MANIFEST.yaml", "CKPT.yaml"]


def truncate(file, sibling):
    file.write_bytes(file.read_bytes()[:-10])


def empty(file, sibling):
    file.write_bytes(b"")


def flip(file, sibling):
    data = bytearray(file.read_bytes())
    # Behind the time in a meta: with another time it would not be the newest any more.
    data[len(data) * 3 // 4] ^= 1
    file.write_bytes(data)


def flip_last(file, sibling):
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def append(file, sibling):
    file.write_bytes(file.read_bytes() + b"\n")


def remove(file, sibling):
    file.unlink()


def swap(file, sibling):
    shutil.copyfile(sibling, file)


def make_folder(file, sibling):
    file.unlink()
    file.mkdir()


HARMS = [truncate, empty, flip, flip_last, append, remove, swap, make_folder]

# Without its meta a folder is no checkpoint at all, see below.
CASES = [
    (name, harm)
    for name in FILES
    for harm in HARMS
    if (name, harm) not in {("CKPT.yaml", remove), ("CKPT.yaml", make_folder)}
]


@pytest.fixture
def run(tmp_path, scale):
    """A function that returns a new checkpointer of the run with its model."""

    def make():
        model = scale(0.0)
        optimizer = torch.optim.Adam(model.parameters())
        return Checkpointer(tmp_path, {"model": model, "optimizer": optimizer}), model

    return make


@pytest.fixture
def three(run):
    """Three checkpoints, of the model's values 1, 2 and 3."""
    checkpointer, model = run()
    saved = []
    for value in (1.0, 2.0, 3.0):
        model.value = value
        model(torch.ones(1)).sum().backward()
        checkpointer.recoverables["optimizer"].step()
        model.value = value
        saved.append(checkpointer.save_checkpoint({"loss": value}, name=f"{value:.0f}"))
    return saved


@pytest.mark.parametrize(("name", "harm"), CASES, ids=lambda case: getattr(case, "__name__", case))
class TestEveryHarmToEveryFile:
    """One file of the newest checkpoint is harmed."""

    def test_recovery_steps_back_to_the_newest_sound_one(self, run, three, caplog, name, harm):
        """With one line that names the checkpoint, the file and what is wrong."""
        harm(three[2].path / name, three[1].path / name)
        checkpointer, model = run()
        assert checkpointer.recover_if_possible() == three[1]
        assert model.value == 2.0
        (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert "CKPT+3" in line and blamed(name, harm) in line
        assert "CKPT+2" not in line

    def test_loading_it_by_name_is_refused_and_changes_nothing(self, run, three, name, harm):
        """The error names folder and file."""
        harm(three[2].path / name, three[1].path / name)
        checkpointer, model = run()
        model.value = 9.0
        with pytest.raises(
            DamagedCheckpointError, match=rf"CKPT\+3 is damaged.*{blamed(name, harm)}"
        ):
            checkpointer.load_checkpoint(three[2])
        assert model.value == 9.0


def blamed(name, harm):
    """Return the file that is named: a sound manifest of another checkpoint blames the others."""
    return "model.ckpt" if (name, harm) == ("MANIFEST.yaml", swap) else name


def flipped(data, place, chance):
    """Return the bytes with one bit changed."""
    changed = bytearray(data)
    changed[place] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(data, place, chance):
    """Return the first bytes."""
    return data[:place]


def zeroed(data, place, chance):
    """Return the bytes with zeros from a place on, as after a power cut; None if they were zeros."""
    return data[:place] + bytes(len(data) - place) if data[place:].strip(b"\0") else None


def grown(data, place, chance):
    """Return the bytes and some more."""
    return data + chance.randbytes(place + 1)


SPOILERS = [flipped, cut, zeroed, grown]


def spoil_anywhere(ckpt, name, spoil, places, chance):
    """Spoil a file at each of the places, and give what differs, restoring it afterwards."""
    file = ckpt.path / name
    data = file.read_bytes()
    for place in places or range(len(data)):
        spoilt = spoil(data, place % len(data), chance)
        if spoilt is not None:
            file.write_bytes(spoilt)
            yield place
    file.write_bytes(data)


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", FILES)
class TestAnywhere:
    """A bit flipped, a file cut off, zeroed or grown, at any place of any file."""

    def test_it_is_found_and_the_file_is_named(self, three, name, spoil):
        """At a sample of the places, the first and the last among them."""
        chance = random.Random(f"{name} {spoil.__name__}")
        places = [0, 1, -1, -2, *(chance.randrange(10**6) for _ in range(20))]
        for place in spoil_anywhere(three[2], name, spoil, places, chance):
            (problem,) = find_damage(three[2].path)
            assert name in problem, place
            count("damaged files, all found")
        assert find_damage(three[2].path) == []

    @pytest.mark.slow
    def test_it_is_found_at_every_single_byte(self, three, name, spoil):
        """All of them, of each file."""
        chance = random.Random(1)
        found = 0
        for place in spoil_anywhere(three[2], name, spoil, None, chance):
            (problem,) = find_damage(three[2].path)
            assert name in problem, place
            found += 1
        count("damaged files, all found", found)
        size = (three[2].path / name).stat().st_size
        assert found == size if spoil is not zeroed else 0 < found <= size

    def test_recovery_steps_back_and_a_later_verification_agrees(self, run, three, name, spoil):
        """Whatever the spoilt meta claims now, nothing of that checkpoint is loaded."""
        chance = random.Random(f"{spoil.__name__} {name}")
        places = [chance.randrange(10**6) for _ in range(3)]
        for place in spoil_anywhere(three[2], name, spoil, places, chance):
            checkpointer, model = run()
            assert checkpointer.recover_if_possible() == three[1], place
            assert model.value == 2.0
            assert [found.status for found in verify(checkpointer.checkpoints_dir)] == [
                "sound",
                "sound",
                "damaged",
            ]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_found(run, three, name, caplog):
    """Both were written by us, and neither is what belongs there: two files change places."""
    one, other = (ckpt.path / name for ckpt in three[1:])
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    checkpointer, model = run()
    assert checkpointer.recover_if_possible() == three[0]
    assert model.value == 1.0
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) == 2
    assert all(blamed(name, swap) in line for line in lines)


class TestSteppingBack:
    """What recovery does when damage is met."""

    def test_it_goes_as_far_back_as_it_must(self, run, three, caplog):
        """Two damaged, two lines, newest first."""
        for ckpt in three[1:]:
            flip(ckpt.path / "model.ckpt", None)
        checkpointer, model = run()
        assert checkpointer.recover_if_possible() == three[0]
        assert model.value == 1.0
        lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert ["CKPT+3" in line for line in lines] == [True, False]
        assert ["CKPT+2" in line for line in lines] == [False, True]
        assert all("checksum differs" in line for line in lines)

    def test_it_steps_along_the_ranking_asked_for(self, run, three):
        """The next best by the key, not the next in time; and none the predicate refuses."""
        flip(three[0].path / "model.ckpt", None)
        checkpointer, _ = run()
        assert checkpointer.recover_if_possible(min_key="loss") == three[1]
        only_old = {"min_key": "loss", "ckpt_predicate": lambda ckpt: ckpt.meta["loss"] != 2.0}
        assert checkpointer.recover_if_possible(**only_old) == three[2]

    def test_damage_that_would_not_be_loaded_is_seen_by_its_size(self, run, three, caplog):
        """A file of a recoverable not asked for: same size is not read, another size is damage."""
        checkpointer, _ = run()
        del checkpointer.recoverables["optimizer"]
        flip(three[2].path / "optimizer.ckpt", None)
        assert checkpointer.recover_if_possible() == three[2]
        truncate(three[2].path / "optimizer.ckpt", None)
        assert checkpointer.recover_if_possible() == three[1]
        assert "optimizer.ckpt has" in caplog.text and "were written" in caplog.text

    @pytest.mark.parametrize("name", FILES[:3])
    def test_if_all_are_damaged_it_raises_and_loads_nothing(self, run, three, name):
        """Every one is named with the reason, and what to do to start anew all the same."""
        for ckpt in three:
            flip(ckpt.path / name, None)
        checkpointer, model = run()
        with pytest.raises(DamagedCheckpointError) as caught:
            checkpointer.recover_if_possible()
        message = str(caught.value)
        assert message.index("CKPT+3") < message.index("CKPT+2") < message.index("CKPT+1")
        assert message.count(name) == 3 and "To start anew" in message
        assert model.value == 0.0

    def test_it_raises_too_when_no_meta_can_be_read(self, run, three):
        """Although then nothing is listed."""
        for ckpt in three:
            empty(ckpt.path / "CKPT.yaml", None)
        checkpointer, model = run()
        with pytest.raises(DamagedCheckpointError, match=r"CKPT\+1.*CKPT\+2.*CKPT\+3"):
            checkpointer.recover_if_possible()
        assert model.value == 0.0

    def test_a_folder_without_its_meta_is_no_checkpoint(self, run, three):
        """As for SpeechBrain; the one before is taken."""
        remove(three[2].path / "CKPT.yaml", None)
        checkpointer, model = run()
        assert checkpointer.recover_if_possible() == three[1]
        assert model.value == 2.0

    def test_a_folder_without_a_manifest_is_unverified_and_loads(self, run, three, caplog):
        """SpeechBrain writes none; there is nothing to compare with and nothing to warn of."""
        forget_manifest(three[2].path)
        checkpointer, model = run()
        assert checkpointer.recover_if_possible() == three[2]
        checkpointer.load_checkpoint(three[2])
        assert model.value == 3.0
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]

    @pytest.mark.parametrize("known_by", ["CKPT.yaml", "HISTORY.jsonl"])
    def test_a_manifest_that_was_removed_is_damage(self, run, three, caplog, known_by):
        """It isn't taken for a checkpoint of SpeechBrain's; of older ones the history tells."""
        if known_by == "HISTORY.jsonl":
            history = three[2].path.parent / "HISTORY.jsonl"
            data = history.read_bytes()
            forget_manifest(three[2].path)
            history.write_bytes(data)
        else:
            (three[2].path / "MANIFEST.yaml").unlink()
            (three[2].path.parent / "HISTORY.jsonl").unlink()
        checkpointer, model = run()
        assert checkpointer.recover_if_possible() == three[1]
        assert model.value == 2.0
        [found] = verify(three[2].path)
        assert found.status == "damaged" and known_by in found.problems[0]
        assert "MANIFEST.yaml is missing" in caplog.text

    def test_a_paramfile_added_later_is_unverified_and_loads(self, run, three, scale):
        """What the manifest doesn't know is not damage."""
        shutil.copy(three[2].path / "model.ckpt", three[2].path / "teacher.ckpt")
        checkpointer, _ = run()
        checkpointer.add_recoverable("teacher", scale(0.0))
        assert checkpointer.recover_if_possible().path == three[2].path
        assert checkpointer.recoverables["teacher"].value == 3.0

    def test_a_format_of_the_future_is_stepped_over_and_named(self, run, three, caplog):
        """With what to do, since it is sound for another release."""
        manifest = three[2].path / "MANIFEST.yaml"
        body = manifest.read_bytes().rpartition(b"manifest-checksum")[0]
        body = body.replace(b"format: 1", b"format: 2")
        manifest.write_bytes(body + _checksum_line(body) + b"\n")
        checkpointer, _ = run()
        assert checkpointer.recover_if_possible() == three[1]
        assert "has format 2, this release reads 1: use the release" in caplog.text


def test_the_manifest_lists_every_file_with_size_and_checksum(three):
    """Which anybody can check with another implementation of the hash."""
    fields = yaml.safe_load((three[0].path / "MANIFEST.yaml").read_text())
    assert fields["format"] == 1
    assert set(fields["files"]) == set(FILES) - {"MANIFEST.yaml"}
    for name, found in fields["files"].items():
        data = (three[0].path / name).read_bytes()
        assert found == {"size": len(data), "xxh3-128": xxhash.xxh3_128_hexdigest(data)}
    # Some builds say more of themselves than their package does.
    assert fields["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_what_is_installed_is_looked_up_once(run, monkeypatch):
    """Not at every save: reading it takes as long as all the rest of a small one."""
    asked = []
    look_up = manifest_module.metadata.version
    monkeypatch.setattr(
        manifest_module.metadata, "version", lambda name: asked.append(name) or look_up(name)
    )
    manifest_module._installed_version.cache_clear()
    checkpointer, _ = run()
    for _ in range(3):
        checkpointer.save_checkpoint()
    assert "torch" in asked
    assert len(asked) == len(set(asked))


def test_file_larger_than_its_disk_is_damage_and_is_not_read(tmp_path, monkeypatch):
    """A hole of a terabyte takes no room, and to read it would take a quarter of an hour."""
    disk = os.statvfs(tmp_path)
    size = 2 * disk.f_blocks * disk.f_frsize
    checkpointer = Checkpointer(tmp_path, {"model": torch.nn.Linear(1, 1)})
    saved = checkpointer.save_checkpoint()
    try:
        os.truncate(saved.path / "model.ckpt", size)
    except OSError:
        pytest.skip(f"no file has {size} bytes on this filesystem")
    manifest = saved.path / "MANIFEST.yaml"
    body = manifest.read_bytes().rpartition(b"manifest-checksum")[0]
    body = re.sub(rb"(model\.ckpt: \{size: )\d+", rb"\g<1>%d" % size, body)
    manifest.write_bytes(body + _checksum_line(body) + b"\n")
    monkeypatch.setattr("lightning_sbckpt._layout.manifest.read_digest", pytest.fail)
    (problem,) = find_damage(saved.path, {"model.ckpt"})
    assert problem.endswith("more than the disk that it lies on: they are a hole")
    with pytest.raises(DamagedCheckpointError, match="they are a hole"):
        checkpointer.load_checkpoint(saved)
