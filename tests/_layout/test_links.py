"""Unchanged files are not written again: what is linked, what must not be, and what it saves."""

from __future__ import annotations

import errno
import os
import shutil
from textwrap import dedent

import pytest
import torch
from _python import python
from _releases import needs_torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt._layout.sizes import real_bytes
from lightning_sbckpt._save.arena import Frozen
from lightning_sbckpt.errors import SaveError

# Only a file whose bytes are known before it is written can be a link instead.
pytestmark = needs_torch("2.6", "torch.serialization.skip_data")

MODES = ["sync", "async", "overlap"]


class Part(torch.nn.Module):
    """One parameter of so many kilobytes; the default is enough for a copy to be hidden."""

    def __init__(self, kilobytes=300):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(kilobytes * 256))


@pytest.fixture
def parts():
    """A large frozen part and a large part that is trained, by name."""
    torch.manual_seed(1)
    return {"frozen": Part(), "head": Part()}


@pytest.fixture
def save(tmp_path, parts):
    """A function that trains and saves, and returns the folder of the new checkpoint."""
    checkpointers = []

    def save(checkpointer=None, *, train="head", **arguments):
        if checkpointer is None:
            if not checkpointers:
                checkpointers.append(Checkpointer(tmp_path / "run", parts, **arguments))
            checkpointer = checkpointers[0]
        if train:
            with torch.no_grad():
                parts[train].weight.add_(1)
        checkpointer.save_checkpoint()
        checkpointer.before_update()
        checkpointer.wait()
        return checkpointer.find_checkpoint().path

    yield save
    for checkpointer in checkpointers:
        checkpointer.close()


def links_of(folder, name="frozen"):
    """Return the number of the file that a recoverable is in, and how many names it has."""
    found = (folder / f"{name}.ckpt").stat()
    return found.st_ino, found.st_nlink


def stored(folder, name="frozen"):
    """Return the parameter that plain torch reads in a checkpoint."""
    return torch.load(folder / f"{name}.ckpt", weights_only=True)["weight"]


def assert_written_anew(before, after, parts):
    """Check that a file of its own was made, that both are whole, and the new one is right."""
    assert links_of(after)[0] != links_of(before)[0]
    assert links_of(after)[1] == 1
    assert find_damage(after) == []
    for name, part in parts.items():
        assert torch.equal(stored(after, name), part.weight)


class TestWhatIsLinked:
    """A file with the very bytes of the one before."""

    @pytest.mark.parametrize("mode", MODES)
    def test_the_frozen_part_is_one_file_in_all_checkpoints(self, save, parts, mode):
        """And the part that is trained has a file in each."""
        folders = [save(save_mode=mode) for _ in range(3)]
        assert len({links_of(folder)[0] for folder in folders}) == 1
        assert links_of(folders[0])[1] == 3
        assert len({links_of(folder, "head")[0] for folder in folders}) == 3
        assert links_of(folders[0], "head")[1] == 1
        for folder in folders:
            assert find_damage(folder) == []
            assert torch.equal(stored(folder), parts["frozen"].weight)
        assert torch.equal(stored(folders[2], "head"), parts["head"].weight)

    @pytest.mark.parametrize("mode", ["async", "overlap"])
    def test_a_copy_is_told_by_the_checksum_that_it_has(self, save, mode, monkeypatch):
        """Nothing of it is read once more, beside a training that wants memory, too."""
        monkeypatch.delattr(Frozen, "sample")
        folders = [save(save_mode=mode) for _ in range(2)]
        assert links_of(folders[0]) == links_of(folders[1])
        assert links_of(folders[0], "head") != links_of(folders[1], "head")

    @pytest.mark.parametrize("mode", MODES)
    def test_a_part_that_thaws_is_written_and_linked_again_when_frozen(self, save, parts, mode):
        """It is compared at every save, not only at the first."""
        first = save(save_mode=mode)
        before = parts["frozen"].weight.detach().clone()
        second = save(train="frozen")
        third = save()
        assert links_of(first)[0] != links_of(second)[0]
        assert links_of(second)[0] == links_of(third)[0]
        assert torch.equal(stored(third), parts["frozen"].weight)
        assert torch.equal(stored(first), before)

    def test_only_the_model_s_frozen_part_with_the_callback(self, tmp_path):
        """`split_model` gives the backbone a file of its own, and that is linked."""
        import lightning as L

        from lightning_sbckpt import SBCheckpoint

        class Model(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.backbone = torch.nn.Linear(256, 256).requires_grad_(False)
                self.head = torch.nn.Linear(256, 100)

            def training_step(self, batch):
                return self.head(self.backbone(batch[0])).square().mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.head.parameters(), lr=0.1)

        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 256)))
        trainer = L.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[SBCheckpoint(tmp_path / "run", split_model=["backbone"], num_to_keep=3)],
        )
        trainer.fit(Model(), loader)
        folders = sorted((tmp_path / "run").glob("CKPT*"))
        assert len(folders) == 3
        assert {links_of(folder, "backbone")[1] for folder in folders} == {3}
        assert {links_of(folder, "model")[1] for folder in folders} == {1}
        assert all(find_damage(folder) == [] for folder in folders)

    def test_the_same_name_again_links_to_the_one_it_replaces(self, save, tmp_path, parts):
        """The bytes outlive the checkpoint that had them first."""
        with Checkpointer(tmp_path / "named", parts) as checkpointer:
            inodes = []
            for _ in range(3):
                ckpt = checkpointer.save_checkpoint(name="best")
                inodes.append(links_of(ckpt.path))
            assert inodes == [(inodes[0][0], 1)] * 3
            assert find_damage(ckpt.path) == []

    def test_retention_of_one_links_on(self, save, tmp_path, parts):
        """The file before is there until the new one is durable."""
        with Checkpointer(tmp_path / "one", parts) as checkpointer:
            inodes = set()
            for _ in range(3):
                checkpointer.save_and_keep_only(num_to_keep=1)
                [ckpt] = checkpointer.list_checkpoints()
                inodes.add(links_of(ckpt.path))
            assert len(inodes) == 1 and inodes.pop()[1] == 1
            assert find_damage(ckpt.path) == []

    def test_small_files_are_just_written(self, save, tmp_path):
        """Comparing them would take as long."""
        with Checkpointer(tmp_path / "small", {"frozen": Part(kilobytes=8)}) as checkpointer:
            for _ in range(2):
                folder = checkpointer.save_checkpoint().path
            assert links_of(folder)[1] == 1


class TestWhatItSaves:
    """Disk, and nothing else."""

    def test_ten_checkpoints_of_a_model_frozen_by_95_percent_cost_one_and_a_half(
        self, tmp_path, parts
    ):
        """In bytes that the filesystem really uses."""
        parts = {"frozen": Part(kilobytes=1900), "head": Part(kilobytes=100)}
        root = tmp_path / "run"
        with Checkpointer(root, parts) as checkpointer:
            first = checkpointer.save_checkpoint().path
            alone = sum(real_bytes(first).values())
            for _ in range(9):
                with torch.no_grad():
                    parts["head"].weight.add_(1)
                checkpointer.save_checkpoint()
            assert len(checkpointer.list_checkpoints()) == 10
            together = sum(real_bytes(root).values())
            assert 1.3 < together / alone < 1.6

    def test_removal_of_any_leaves_the_others_whole(self, save, tmp_path, parts):
        """The first, which wrote the bytes, and the last, which the next would link to."""
        folders = [save() for _ in range(4)]
        checkpointer = Checkpointer(tmp_path / "run", parts)
        shutil.rmtree(folders.pop(0))
        shutil.rmtree(folders.pop())
        for folder in folders:
            assert find_damage(folder) == []
            checkpointer.load_checkpoint(checkpointer.find_checkpoint())
        after = save()
        # The last is gone; nothing to link to, so it is whole by itself.
        assert_written_anew(folders[-1], after, parts)

    def test_a_disk_with_room_for_what_changes_is_enough(self, tmp_path, parts):
        """What will be linked is not counted as needed; what has changed is."""

        class Nearly(LocalStorage):
            free = 10**9

            def free_bytes(self, path):
                return self.free

        storage = Nearly()
        with Checkpointer(tmp_path, parts, storage=storage) as checkpointer:
            checkpointer.save_checkpoint()
            storage.free = 400_000
            with torch.no_grad():
                parts["head"].weight.add_(1)
            checkpointer.save_checkpoint()
            with torch.no_grad():
                parts["frozen"].weight.add_(1)
                parts["head"].weight.add_(1)
            with pytest.raises(SaveError, match=r"needs 6\d\d,\d{3} bytes, and 400,000 are free"):
                checkpointer.save_checkpoint()
            assert len(checkpointer.list_checkpoints()) == 2


class TestWhatIsNotLinked:
    """Anything that could make a checkpoint other than what was saved."""

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("place", [100, 51_000, -20])
    def test_one_element_deep_inside_a_large_tensor(self, save, parts, mode, place):
        """The few bytes that are compared first are the same; all are compared in the end."""
        first = save(save_mode=mode, train=None)
        with torch.no_grad():
            parts["frozen"].weight[place] += 1
        samples = seen_samples(parts["frozen"], place, late=mode != "sync")
        assert samples[0] == samples[1]
        assert_written_anew(first, save(train=None), parts)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("damage", ["touched", "rewritten", "truncated", "swapped", "removed"])
    def test_a_file_that_somebody_has_touched(self, save, parts, mode, damage):
        """Damage isn't handed on: the new checkpoint has bytes of its own."""
        first = save(save_mode=mode)
        file = first / "frozen.ckpt"
        data, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        if damage == "touched":
            os.utime(file, ns=(times[0], times[1] + 1))
        elif damage == "rewritten":
            with file.open("r+b") as stream:
                stream.seek(100_000)
                stream.write(bytes([data[100_000] ^ 1]))
        elif damage == "truncated":
            os.truncate(file, len(data) - 1)
            os.utime(file, ns=times)
        elif damage == "swapped":
            # The same size, the same time, other bytes.
            file.rename(file.with_name("away"))
            file.write_bytes(bytes(len(data)))
            os.utime(file, ns=times)
        else:
            file.unlink()
        second = save()
        assert links_of(second)[1] == 1
        assert find_damage(second) == []
        assert torch.equal(stored(second), parts["frozen"].weight)
        # And that is what is linked to from now on.
        assert links_of(save())[0] == links_of(second)[0]

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        "number", [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOENT]
    )
    def test_where_the_filesystem_has_no_links_files_are_written(
        self, save, parts, mode, number, monkeypatch
    ):
        """Refused, over devices, too many, unknown, just removed: the save goes on."""
        first = save(save_mode=mode)
        calls = []

        def refuse(*arguments, **keywords):
            calls.append(arguments)
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", refuse)
        assert_written_anew(first, save(), parts)
        assert len(calls) == 1

    @pytest.mark.parametrize("mode", MODES)
    def test_switched_off(self, save, parts, mode):
        """With `link_unchanged=False` each checkpoint has bytes of its own."""
        first = save(save_mode=mode, link_unchanged=False)
        assert_written_anew(first, save(), parts)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_save_that_fails_changes_nothing_of_what_is_linked_to(
        self, save, parts, mode, monkeypatch
    ):
        """The next one is linked to the last that was published."""
        first = save(save_mode=mode)
        with monkeypatch.context() as patch:

            def full(self, source, target):
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(LocalStorage, "rename", full)
            with pytest.raises(SaveError, match="No space left"):
                save()
        second = save()
        assert links_of(second)[0] == links_of(first)[0]
        assert find_damage(second) == []

    def test_files_of_an_earlier_process_are_not_linked_to(self, tmp_path):
        """A resumed run can't know that nobody touched them: it writes once, then links."""
        script = dedent(
            """
            import sys, torch
            from lightning_sbckpt import Checkpointer

            torch.manual_seed(1)
            model = torch.nn.Linear(200, 200)
            checkpointer = Checkpointer(sys.argv[1], {"frozen": model})
            print(bool(checkpointer.recover_if_possible()))
            for _ in range(2):
                checkpointer.save_checkpoint()
            """
        )
        resumed = [python("-c", script, tmp_path).stdout.strip() for _ in range(2)]
        assert resumed == ["False", "True"]
        checkpointer = Checkpointer(tmp_path)
        folders = [ckpt.path for ckpt in checkpointer.list_checkpoints()]
        by_time = sorted(folders, key=lambda folder: (folder / "CKPT.yaml").stat().st_mtime_ns)
        inodes = [links_of(folder)[0] for folder in by_time]
        assert inodes[0] == inodes[1] != inodes[2] == inodes[3]
        assert all(find_damage(folder) == [] for folder in folders)


def seen_samples(part, place, *, late):
    """Return what is compared first of a part, before and after one element was changed."""
    from _torch_files import contents_of

    from lightning_sbckpt._format.image import Image
    from lightning_sbckpt._format.templates import Templates
    from lightning_sbckpt._save.arena import Arena

    found = []
    for change in (0, 1):
        weight = part.weight.detach().clone()
        weight[place] += change
        image = contents_of({"weight": weight}, Templates(), "a.ckpt")["a.ckpt"].source
        assert isinstance(image, Image)
        source = Arena().take({"a": image})[0]["a"] if late else image
        found.append(source.sample())
    return found
