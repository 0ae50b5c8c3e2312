"""What is on the disk at each instant: staging, one rename, sweeping, and processes that die."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from _processes import context

import lightning_sbckpt._io.exchange as exchange_module
import lightning_sbckpt._io.storage as storage_module
from lightning_sbckpt import Checkpointer
from lightning_sbckpt._catalog.index import INDEX_NAME
from lightning_sbckpt._io.exchange import exchange
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout import publish
from lightning_sbckpt._layout.history import HISTORY_NAME
from lightning_sbckpt._layout.lock import LOCK_NAME
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt.errors import SaveError

# Children start from a server process that has torch loaded already.


class Number:
    """A stateful object with one number, in two files' worth of tensors."""

    def __init__(self, number=0):
        self.number = number

    def state_dict(self):
        return {"number": self.number, "filling": torch.full((1000,), float(self.number))}

    def load_state_dict(self, state):
        assert state["filling"].tolist() == [state["number"]] * 1000
        self.number = state["number"]


class Hooked:
    """A save hook that does something before it writes."""

    def __init__(self, action):
        self.action = action

    def __call__(self, obj, path):
        self.action(Path(path))
        Path(path).write_text("hooked")


def checkpointer_of(folder, number=0, **arguments):
    """Return a checkpointer of one `Number`."""
    return Checkpointer(folder, {"number": Number(number)}, **arguments)


def visible(folder):
    """Return the names that look like checkpoints."""
    return sorted(name for name in os.listdir(folder) if name.startswith("CKPT"))


def leftovers(folder):
    """Return the names that are neither checkpoints nor the lock and the index of the folder."""
    known = {*visible(folder), LOCK_NAME, INDEX_NAME, HISTORY_NAME}
    return sorted(set(os.listdir(folder)) - known)


def whole_numbers(folder):
    """Return the numbers of all checkpoints by name, each found whole and loaded."""
    checkpointer = checkpointer_of(folder)
    numbers = {}
    for ckpt in checkpointer.list_checkpoints():
        assert find_damage(ckpt.path) == []
        checkpointer.load_checkpoint(ckpt)
        numbers[ckpt.path.name] = checkpointer.recoverables["number"].number
    assert set(numbers) == set(visible(folder))
    return numbers


@pytest.fixture
def no_swap(monkeypatch):
    """Two folders can't swap their names here, as on NFS."""
    monkeypatch.setattr(storage_module, "exchange", lambda one, other: False)


@pytest.fixture(params=["swap", "no_swap"])
def each_way(request):
    """Folders swap their names, or can't."""
    if request.param == "no_swap":
        request.getfixturevalue("no_swap")


class TestWhatIsVisible:
    """During a save and after a failed one."""

    def test_nothing_is_visible_while_hooks_write(self, tmp_path):
        """They write into a folder beside, whose name no reader takes for a checkpoint."""
        seen = []

        def look(path):
            seen.append((visible(tmp_path), path.parent.parent, path.parent.name[0]))

        checkpointer = checkpointer_of(tmp_path)
        checkpointer.add_recoverable("hooked", object(), custom_save_hook=Hooked(look))
        checkpointer.save_checkpoint(name="a")
        assert seen == [([], tmp_path, ".")]
        checkpointer.save_checkpoint(name="b")
        assert seen[1][0] == ["CKPT+a"]
        assert os.listdir(tmp_path) and leftovers(tmp_path) == []

    @pytest.mark.usefixtures("each_way")
    def test_a_name_used_again_is_replaced_at_the_end(self, tmp_path):
        """While the new one is written the old one is there, whole."""
        checkpointer = checkpointer_of(tmp_path, 1)
        checkpointer.save_checkpoint(name="a")
        checkpointer.recoverables["number"].number = 2
        during = []
        look = Hooked(lambda path: during.append(whole_numbers(tmp_path)))
        checkpointer.add_recoverable("hooked", object(), custom_save_hook=look)
        checkpointer.save_checkpoint(name="a")
        assert during == [{"CKPT+a": 1}]
        assert whole_numbers(tmp_path) == {"CKPT+a": 2}
        assert leftovers(tmp_path) == []

    def test_a_name_used_again_is_never_without_a_checkpoint(self, tmp_path):
        """At any instant: who evaluates it, or is started while the run is dead, finds one."""
        seen = []

        class Watching(LocalStorage):
            def before(self, operation, path, target=None):
                (found,) = Checkpointer(tmp_path, access="read").list_checkpoints()
                assert find_damage(found.path) == []
                seen.append(found.meta["n"])

        checkpointer_of(tmp_path, 1).save_checkpoint({"n": 1}, name="a")
        checkpointer_of(tmp_path, 2, storage=Watching()).save_checkpoint({"n": 2}, name="a")
        assert seen == sorted(seen)
        assert {1, 2} == set(seen)
        assert whole_numbers(tmp_path) == {"CKPT+a": 2}
        assert leftovers(tmp_path) == []

    def test_a_checkpointer_made_during_a_save_lets_it_be(self, tmp_path):
        """Sweeping asks for the lock of the folder, which the one who saves holds."""
        checkpointer = checkpointer_of(tmp_path, 1)
        make_another = Hooked(lambda path: checkpointer_of(tmp_path))
        checkpointer.add_recoverable("hooked", object(), custom_save_hook=make_another)
        assert checkpointer.save_checkpoint() in checkpointer.list_checkpoints()

    def test_two_that_publish_in_one_second_do_not_take_each_others_name(self, tmp_path):
        """The one that comes second takes the next number, and nothing is lost."""
        other = checkpointer_of(tmp_path, 2)

        class Slow(LocalStorage):
            def flush_dir(self, path):
                if path.name.startswith(".staging") and not other.list_checkpoints():
                    other.save_checkpoint()
                super().flush_dir(path)

        checkpointer_of(tmp_path, 1, storage=Slow()).save_checkpoint()
        assert sorted(whole_numbers(tmp_path).values()) == [1, 2]
        assert leftovers(tmp_path) == []


class Recording(LocalStorage):
    """A disk that notes what is done to it, and can fail at the n-th operation."""

    def __init__(self, fail_at=0, error=None):
        self.done = []
        self.fail_at = fail_at
        self.error = error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def before(self, operation, path, target=None):
        self.done.append((operation, path) if target is None else (operation, path, target))
        if len(self.done) == self.fail_at:
            raise self.error


def two_files(folder, number=0, **arguments):
    """Return a checkpointer of a `Number` and of an object that makes a folder."""

    def make_folder(obj, path):
        path.mkdir()
        (path / "inside.txt").write_text("inside")

    checkpointer = checkpointer_of(folder, number, **arguments)
    checkpointer.add_recoverable("folder", object(), lambda *args: None, make_folder)
    return checkpointer


def last(done, operation, path):
    """Return when an operation was done to a path for the last time, or -1."""
    return max((at for at, step in enumerate(done) if step[:2] == (operation, path)), default=-1)


class TestOrderOfWrites:
    """A power cut at any instant finds either the old state or the new one."""

    def test_everything_is_flushed_before_what_makes_it_count(self, tmp_path):
        """Files, manifest, meta, folder, rename, parent; old ones go only after that."""
        two_files(tmp_path, 1).save_checkpoint(name="old")
        storage = Recording()
        two_files(tmp_path, 2, storage=storage).save_and_keep_only(name="new")
        done = storage.done
        (staged,) = [path for what, path, *_ in done if what == "make_dir"]
        published = done.index(("rename", staged, tmp_path / "CKPT+new"))
        files = {path for what, path, *_ in done[:published] if what == "flush_file"}
        names = {path.relative_to(staged).as_posix() for path in files}
        assert names == {"number.ckpt", "folder.ckpt/inside.txt", "MANIFEST.yaml", "CKPT.yaml"}
        for path in files:
            flushed = last(done, "flush_file", path)
            assert last(done, "write", path) < flushed
            assert flushed < published
            # The meta is what makes a folder a checkpoint: it is begun when all else is flushed.
            if path.name != "CKPT.yaml":
                assert flushed < done.index(("create", staged / "CKPT.yaml"))
        # A new name is durable only when its folder is flushed after it.
        inner = last(done, "flush_dir", staged / "folder.ckpt")
        assert 0 <= inner < published
        outer = last(done, "flush_dir", staged)
        assert max(last(done, "create", path) for path in files) < outer < published
        assert done[published + 1] == ("flush_dir", tmp_path)
        # Then the old one: first it is no checkpoint any more, durably, then its files go.
        what, source, target = done[published + 2]
        assert (what, source) == ("rename", tmp_path / "CKPT+old")
        assert target.parent == tmp_path
        assert target.name.startswith(".removed+")
        assert done[published + 3] == ("flush_dir", tmp_path)
        removals = done[published + 4 :]
        assert {what for what, _ in removals} == {"remove_file", "remove_dir"}
        assert removals[-1] == ("remove_dir", target)
        assert all(target in (path, *path.parents) for _, path in removals)
        assert not any("remove" in what for what, *_ in done[:published])

    def test_written_files_are_synced(self, tmp_path, monkeypatch):
        """Each by `fsync` on itself: content, folder, parent."""
        synced = set()
        fsync = os.fsync

        def recording(descriptor):
            synced.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", recording)
        two_files(tmp_path / "run").save_checkpoint()
        staged = {name for name in synced if name.startswith(".staging+")}
        assert len(staged) == 1
        assert synced - staged == {
            "number.ckpt",
            "folder.ckpt",
            "inside.txt",
            "MANIFEST.yaml",
            "CKPT.yaml",
            "run",
            tmp_path.name,  # In which the folder of all checkpoints was made.
        }


def operations(tmp_path, name):
    """Return how many operations one save with pruning takes."""
    folder = tmp_path / "counted"
    storage = Recording()
    for each in ("old", "kept"):
        two_files(folder, 1).save_checkpoint(name=each)
    two_files(folder, 2, storage=storage).save_and_keep_only(name=name)
    return len(storage.done)


class TestFailingDisk:
    """An error of the disk at each of the operations, one after the other."""

    @pytest.mark.sample(1)
    @pytest.mark.usefixtures("each_way")
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
    @pytest.mark.parametrize("name", ["new", "kept"])
    def test_earlier_checkpoints_stay_whole_at_every_failure(self, tmp_path, name, code):
        """A new name and a replaced one; afterwards a fresh checkpointer goes on."""
        count = operations(tmp_path, name)
        assert count > 15
        outcomes = set()
        for at in range(1, count + 1):
            folder = tmp_path / f"fails at {at}"
            for each in ("old", "kept"):
                two_files(folder, 1).save_checkpoint(name=each)
            storage = Recording(at, OSError(code, os.strerror(code)))
            checkpointer = two_files(folder, 2, storage=storage)
            failure = ""
            try:
                checkpointer.save_checkpoint(name=name)
            except SaveError as error:
                failure = str(error)
            if failure:
                outcomes.add("failed")
                assert os.strerror(code) in failure and "earlier" in failure
                assert whole_numbers(folder) == {"CKPT+old": 1, "CKPT+kept": 1}
            else:
                outcomes.add("saved")
                assert whole_numbers(folder)[f"CKPT+{name}"] == 2
                # What fails from here on is the removal of the old ones.
                with contextlib.suppress(OSError):
                    checkpointer.delete_checkpoints()
                assert whole_numbers(folder)[f"CKPT+{name}"] == 2
            two_files(folder)
            assert leftovers(folder) == []
            checkpointer = two_files(folder, 3)
            checkpointer.save_and_keep_only(name="after")
            assert whole_numbers(folder) == {"CKPT+after": 3}
        assert outcomes == {"failed", "saved"}

    def test_a_failed_hook_leaves_nothing_behind(self, tmp_path):
        """Not even a staging folder."""

        def fail(path):
            path.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        checkpointer = checkpointer_of(tmp_path, 1)
        checkpointer.save_checkpoint(name="a")
        checkpointer.add_recoverable("full", object(), custom_save_hook=Hooked(fail))
        with pytest.raises(
            SaveError, match=r"save hook of 'full' failed: OSError: .*No space left"
        ):
            checkpointer.save_checkpoint(name="b")
        assert visible(tmp_path) == ["CKPT+a"]
        assert leftovers(tmp_path) == []


class Died(BaseException):
    """The process ends here."""


class Mortal(Recording):
    """A disk of a process that ends at the n-th operation: nothing is done any more after it."""

    def before(self, operation, path, target=None):
        if len(self.done) + 1 >= self.fail_at:
            raise Died
        super().before(operation, path, target)


class TestInterruptedSteps:
    """The process ends between two operations, and the next one starts."""

    @pytest.mark.sample(1)
    @pytest.mark.usefixtures("each_way")
    @pytest.mark.parametrize("name", ["new", "kept"])
    def test_at_every_operation_all_is_whole_and_the_next_start_clears_up(self, tmp_path, name):
        """Whatever the replaced, removed or new checkpoint had come to."""
        count = operations(tmp_path, name)
        seen = set()
        for at in range(1, count + 1):
            folder = tmp_path / f"dies at {at}"
            for each in ("old", "kept"):
                two_files(folder, 1).save_checkpoint(name=each)
            with pytest.raises(Died):
                two_files(folder, 2, storage=Mortal(at)).save_and_keep_only(name=name)
            # The next process.
            numbers = whole_numbers(folder)
            assert leftovers(folder) == []
            seen.add(tuple(sorted(numbers.items())))
            assert set(numbers.values()) <= {1, 2}
            if 2 not in numbers.values():
                assert numbers == {"CKPT+old": 1, "CKPT+kept": 1}
            recovered = two_files(folder)
            recovered.recover_if_possible()
            expected = 2 if 2 in numbers.values() else 1
            assert recovered.recoverables["number"].number == expected
        assert len(seen) >= 3

    def test_what_was_given_up_is_so_durably_before_its_files_go(self, tmp_path):
        """The process died before it flushed; without it a power cut could bring back the name."""
        checkpointer_of(tmp_path, 1).save_checkpoint(name="a")
        (tmp_path / "CKPT+a").rename(tmp_path / f".removed+{'0' * 32}+CKPT+a")
        storage = Recording()
        checkpointer_of(tmp_path, storage=storage)
        what = [operation for operation, *_ in storage.done]
        assert storage.done[0] == ("flush_dir", tmp_path)
        assert "remove_file" in what and leftovers(tmp_path) == []

    def test_what_can_not_be_flushed_is_not_cleared(self, tmp_path):
        """There is time enough at the next start."""
        checkpointer_of(tmp_path, 1).save_checkpoint(name="a")
        left = (tmp_path / "CKPT+a").rename(tmp_path / f".removed+{'0' * 32}+CKPT+a")
        storage = Recording(1, OSError(errno.EIO, "the disk"))
        checkpointer_of(tmp_path, storage=storage)
        assert storage.done == [("flush_dir", tmp_path)]
        assert find_damage(left) == []
        checkpointer_of(tmp_path)
        assert leftovers(tmp_path) == []

    def test_a_replacement_interrupted_between_its_renames_is_undone(self, tmp_path, caplog):
        """The old one is brought back, and said so."""
        caplog.set_level("INFO")
        checkpointer_of(tmp_path, 1).save_checkpoint(name="a")
        (tmp_path / "CKPT+a").rename(tmp_path / f".replaced+{'0' * 32}+CKPT+a")
        (tmp_path / f".staging+{'0' * 32}").mkdir()
        checkpointer = checkpointer_of(tmp_path)
        assert whole_numbers(tmp_path) == {"CKPT+a": 1}
        assert leftovers(tmp_path) == []
        assert "brought back" in caplog.text and "CKPT+a" in caplog.text
        checkpointer.recover_if_possible()
        assert checkpointer.recoverables["number"].number == 1

    def test_a_replacement_that_was_done_is_not_undone(self, tmp_path):
        """Only the rest of the old one goes."""
        checkpointer_of(tmp_path, 2).save_checkpoint(name="a")
        checkpointer_of(tmp_path / "other", 1).save_checkpoint(name="a")
        (tmp_path / "other" / "CKPT+a").rename(tmp_path / f".replaced+{'0' * 32}+CKPT+a")
        assert whole_numbers(tmp_path / ".") == {"CKPT+a": 2}

    @pytest.mark.parametrize("newer_first", [True, False])
    def test_of_two_that_were_replaced_the_one_that_was_whole_to_the_end_is_brought_back(
        self, tmp_path, newer_first
    ):
        """One that could not be removed lies about when the next replacement is interrupted."""
        for number, other in enumerate(("half removed", "replaced"), start=1):
            checkpointer_of(tmp_path / other, number).save_checkpoint(name="a")
        (tmp_path / "half removed" / "CKPT+a" / "number.ckpt").unlink()
        run = tmp_path / "run"
        # The order in which a folder is listed is that of its making, or of a hash, or any other.
        for marks in ("0123456789", "9876543210"):
            run.mkdir()
            older, newer = marks[0], marks[-1]
            moves = [("half removed", older), ("replaced", newer)]
            for other, mark in moves[:: -1 if newer_first else 1]:
                shutil.copytree(tmp_path / other / "CKPT+a", run / f".replaced+{mark * 32}+CKPT+a")
            assert whole_numbers(run) == {"CKPT+a": 2}
            assert leftovers(run) == []
            shutil.rmtree(run)

    @pytest.mark.usefixtures("no_swap")
    def test_a_refused_removal_does_not_cost_the_checkpoint_after_it(self, tmp_path):
        """The disk refuses once while the replaced one goes; the next replacement is killed."""

        class Ailing(LocalStorage):
            """A disk that refuses the second removal, and whose process dies at a publication."""

            removals = 0
            dies = dead = False

            def before(self, operation, path, target=None):
                self.removals += operation == "remove_file"
                if operation == "remove_file" and self.removals == 2:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                publishing = operation == "rename" and path.name.startswith(".staging")
                self.dead = self.dead or (self.dies and publishing)
                if self.dead:
                    raise Died

        # The order in which the two lie in the folder is up to chance.
        for attempt in range(6):
            folder = tmp_path / f"{attempt}"
            checkpointer_of(folder, 1).save_checkpoint(name="a")
            storage = Ailing()
            checkpointer = checkpointer_of(folder, 2, storage=storage)
            checkpointer.save_checkpoint(name="a")
            assert storage.removals >= 2
            storage.dies = True
            checkpointer.recoverables["number"].number = 3
            with pytest.raises(Died):
                checkpointer.save_checkpoint(name="a")
            assert whole_numbers(folder) == {"CKPT+a": 2}

    def test_a_removal_interrupted_after_its_rename_is_finished(self, tmp_path):
        """What is being removed is no checkpoint, whatever it still holds."""
        saved = checkpointer_of(tmp_path, 1).save_checkpoint(name="a")
        checkpointer_of(tmp_path, 2).save_checkpoint(name="b")
        saved.path.rename(tmp_path / f".removed+{'0' * 32}+CKPT+a")
        assert [c.path.name for c in checkpointer_of(tmp_path).list_checkpoints()] == ["CKPT+b"]
        assert leftovers(tmp_path) == []

    def test_sweeping_touches_nothing_else(self, tmp_path):
        """Files of those names, links, and whatever else starts with a dot."""
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "mine").write_text("mine")
        run = tmp_path / "run"
        run.mkdir()
        (run / ".staging+file").write_text("mine")
        (run / ".removed+link").symlink_to(outside)
        (run / ".git").mkdir()
        (run / ".removed+1+CKPT+x").mkdir()
        (run / ".removed+1+CKPT+x" / "link").symlink_to(outside)
        checkpointer_of(run)
        assert leftovers(run) == [".git", ".removed+link", ".staging+file"]
        assert os.listdir(outside) == ["mine"]

    def test_without_locks_only_what_is_old_is_swept(self, tmp_path, monkeypatch):
        """On a filesystem that has none nobody can tell whether a save is still running."""

        def no_locks(descriptor, operation):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(publish.fcntl, "flock", no_locks)
        for name in ("young", "old"):
            (tmp_path / f".staging+{name}").mkdir()
        yesterday = time.time() - 25 * 3600
        os.utime(tmp_path / ".staging+old", (yesterday, yesterday))
        checkpointer = checkpointer_of(tmp_path, 1)
        assert leftovers(tmp_path) == [".staging+young"]
        assert checkpointer.save_checkpoint() in checkpointer.list_checkpoints()


def save_and_stop(folder, how):
    """In a child: begin a save; inside its hook die, or stay for long."""

    def stop(path):
        path.write_text("half")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    checkpointer = checkpointer_of(folder, 2, access="shared")
    checkpointer.add_recoverable("hooked", object(), custom_save_hook=Hooked(stop))
    checkpointer.save_and_keep_only(name="second", num_to_keep=1)


@pytest.fixture
def start():
    """A function that starts a child; every child is ended at the end."""
    children = []

    def start_child(function, *args):
        child = context.Process(target=function, args=args)
        child.start()
        children.append(child)
        return child

    yield start_child
    for child in children:
        child.kill()
        child.join()


class TestKilledProcesses:
    """Processes that really die."""

    def test_one_killed_inside_a_hook_leaves_no_trace_after_the_next_start(self, tmp_path, start):
        """Earlier checkpoints are whole, nothing new is visible, the staging folder is swept."""
        checkpointer_of(tmp_path, 1, access="shared").save_checkpoint(name="first")
        child = start(save_and_stop, tmp_path, "die")
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        (left,) = leftovers(tmp_path)
        assert left.startswith(".staging+")
        assert visible(tmp_path) == ["CKPT+first"]
        assert whole_numbers(tmp_path) == {"CKPT+first": 1}
        assert leftovers(tmp_path) == []

    def test_the_folder_of_a_living_process_is_left_alone_until_it_dies(self, tmp_path, start):
        """Another process starts, saves and prunes meanwhile."""
        checkpointer_of(tmp_path, 1, access="shared").save_checkpoint(name="first")
        child = start(save_and_stop, tmp_path, "stay")
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".staging+*/hooked.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.01)
        (left,) = leftovers(tmp_path)
        checkpointer = checkpointer_of(tmp_path, 3, access="shared")
        checkpointer.save_and_keep_only(name="third")
        assert leftovers(tmp_path) == [left]
        assert (tmp_path / left / "hooked.ckpt").read_text() == "half"
        child.kill()
        child.join()
        assert whole_numbers(tmp_path) == {"CKPT+third": 3}
        assert leftovers(tmp_path) == []


class TestExchange:
    """Two names swap what they stand for."""

    def test_folders_swap_their_names(self, tmp_path):
        """With all that is in them."""
        for name in "ab":
            (tmp_path / name).mkdir()
            (tmp_path / name / f"was {name}").touch()
        assert exchange(tmp_path / "a", tmp_path / "b")
        assert os.listdir(tmp_path / "a") == ["was b"]
        assert os.listdir(tmp_path / "b") == ["was a"]

    def test_one_that_is_missing_is_an_error(self, tmp_path):
        """The disk's own, with both names; nothing has changed."""
        (tmp_path / "a").mkdir()
        with pytest.raises(FileNotFoundError) as raised:
            exchange(tmp_path / "a", tmp_path / "b")
        assert (raised.value.filename, raised.value.filename2) == (
            str(tmp_path / "a"),
            str(tmp_path / "b"),
        )
        assert os.listdir(tmp_path) == ["a"]

    @pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV])
    def test_a_system_that_can_not_says_so(self, tmp_path, monkeypatch, code):
        """An old kernel, or a filesystem without it: no error, and nothing is done."""

        def refuse(*_):
            ctypes.set_errno(code)
            return -1

        monkeypatch.setattr(exchange_module, "_renameat2", lambda: refuse)
        assert not exchange(tmp_path / "a", tmp_path / "b")
        monkeypatch.setattr(exchange_module, "_renameat2", lambda: None)
        assert not exchange(tmp_path / "a", tmp_path / "b")
