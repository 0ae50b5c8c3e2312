"""Marks: what this user's own runs wrote is read back, and nothing else."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_sbckpt import Checkpointer, trusting_pickle
from lightning_sbckpt._format import encode as state_module
from lightning_sbckpt._format import keys as keys_module
from lightning_sbckpt._format.keys import SECRET, SECRET_FILE, share_with_ranks, user_file
from lightning_sbckpt._format.marks import judge
from lightning_sbckpt._io.storage import digest
from lightning_sbckpt._layout.manifest import MANIFEST_NAME, Manifest, dump_manifest, read_manifest
from lightning_sbckpt.averaging import save_average
from lightning_sbckpt.errors import ConfigurationError, DamagedCheckpointError, UntrustedPickleError

A_SECRET = "a-secret-that-is-long-enough-to-be-one"
ANOTHER = "another-secret-long-enough-to-be-one-as-well"

executed: list[str] = []


def execute(word: str) -> str:
    """What a forged pickle has called, if it can."""
    executed.append(word)
    return word


class Forged:
    """Calls `execute` when it is unpickled."""

    def __reduce__(self):
        return execute, ("forged",)


class Word:
    """Something that only pickle can hold."""

    def __init__(self, word: str) -> None:
        self.word = word

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Word) and other.word == self.word

    __hash__ = None


class Holds:
    """A recoverable."""

    def __init__(self, word: object = None) -> None:
        self.word = word

    def state_dict(self) -> dict[str, object]:
        return {"word": self.word}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.word = state["word"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user without any secret yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(state_module, "_warned", set())
    another_process()
    executed.clear()
    yield tmp_path / "config"
    assert not executed
    another_process()


def another_process() -> None:
    """Forget the secret that this process alone has."""
    keys_module._Job.key, keys_module._Job.shared = None, False


def save(root: Path, **words: str) -> Path:
    """Save words by name; return the folder."""
    recoverables = {name: Holds(Word(word)) for name, word in words.items()}
    with Checkpointer(root, recoverables) as checkpointer:
        return checkpointer.save_checkpoint().path


def load(root: Path, *names: str) -> list[object]:
    """Return what is read back."""
    recoverables = {name: Holds() for name in names or ("one",)}
    with Checkpointer(root, recoverables, access="read") as checkpointer:
        assert checkpointer.recover_if_possible() is not None
    return [each.word for each in recoverables.values()]


def manifest_anew(folder: Path) -> None:
    """Write a manifest that fits, as whoever can write to the folder can."""
    old = read_manifest(folder)
    files = {name: digest(folder / name) for name in old.files}
    (folder / MANIFEST_NAME).write_bytes(dump_manifest(Manifest(files, old.lineage)))


def pickled(folder: Path, name: str = "one") -> Path:
    return folder / f"{name}+pickled.ckpt"


def refused(root: Path, *names: str, because: str = "secret") -> None:
    """Require that nothing is read without trust."""
    with pytest.raises(UntrustedPickleError, match=because):
        load(root, *names)


class TestReadBack:
    """What one user's runs wrote."""

    def test_nothing_is_asked_for(self, tmp_path):
        """In another `Checkpointer`, and with the same secret in every later process."""
        save(tmp_path / "run", one="a")
        assert load(tmp_path / "run") == [Word("a")]

    @pytest.mark.long
    def test_another_process_of_the_user_reads_it(self, tmp_path):
        """The secret outlives the process."""
        save(tmp_path / "run", one="a")
        code = (
            "import sys; from test_marks import load, Path; print(load(Path(sys.argv[1]))[0].word)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.strip() == "a", done.stderr

    def test_plain_torch_opens_the_files(self, tmp_path):
        """A mark is the comment of the archive, which readers pass over."""
        folder = save(tmp_path / "run", one="a")
        assert torch.load(folder / "one.ckpt", weights_only=True) == {"word": None}
        parts = torch.load(pickled(folder), weights_only=False)
        assert parts == {("word",): Word("a")}

    def test_a_moved_and_a_copied_checkpoint_keep_their_mark(self, tmp_path):
        """A folder may be moved, alone or with others."""
        folder = save(tmp_path / "run", one="a")
        (tmp_path / "elsewhere").mkdir()
        folder.rename(tmp_path / "elsewhere" / "CKPT+moved")
        assert load(tmp_path / "elsewhere") == [Word("a")]

    def test_an_average_has_the_marks_of_what_it_copies(self, tmp_path):
        """As its own has the newest source; no mark is made for what is copied."""
        model = torch.nn.Linear(1, 1)
        with Checkpointer(tmp_path / "run", {"model": model, "one": Holds(Word("a"))}) as saver:
            sources = [saver.save_checkpoint().path, saver.save_checkpoint().path]
        average = save_average(tmp_path / "average", sources, with_rest=True)
        assert load(tmp_path / "average") == [Word("a")]
        assert pickled(average.path).read_bytes() == pickled(sources[1]).read_bytes()

    def test_a_file_that_has_not_changed_is_a_link(self, tmp_path):
        """The same bytes have the same mark."""
        word = Word("a" * 2**17)
        with Checkpointer(tmp_path / "run", {"one": Holds(word)}) as saver:
            first, second = saver.save_checkpoint().path, saver.save_checkpoint().path
        assert pickled(first).samefile(pickled(second))

    @pytest.mark.parametrize("mode", ["async", "overlap"])
    def test_saved_in_the_background(self, tmp_path, mode):
        """The bytes that are marked are those that are written."""
        with Checkpointer(tmp_path / "run", {"one": Holds(Word("a"))}, save_mode=mode) as saver:
            saver.save_checkpoint()
        assert load(tmp_path / "run") == [Word("a")]

    def test_the_state_need_not_be_a_container(self, tmp_path):
        """Whole states that only pickle holds are apart as well."""
        holds = Holds()
        holds.state_dict = lambda: Word("all of it")
        got = Holds()
        got.load_state_dict = lambda state: setattr(got, "word", state)
        Checkpointer(tmp_path / "run", {"one": holds}).save_checkpoint()
        Checkpointer(tmp_path / "run", {"one": got}).recover_if_possible()
        assert got.word == Word("all of it")


class TestForgery:
    """Whoever can write to the folder can't have anything unpickled."""

    @pytest.fixture
    def folder(self, tmp_path):
        return save(tmp_path / "run", one="a", two="b")

    def test_a_file_without_a_mark(self, tmp_path, folder):
        """It is refused, with the manifest made to fit."""
        torch.save({("word",): Forged()}, pickled(folder))
        manifest_anew(folder)
        refused(tmp_path / "run", because="it has no mark of this user's runs")

    def test_the_mark_of_another_file(self, tmp_path, folder):
        """Its comment is put behind a forged file."""
        sound = pickled(folder).read_bytes()
        torch.save({("word",): Forged()}, pickled(folder))
        forged = pickled(folder).read_bytes()
        end = sound.rfind(b"PK\x05\x06") + 20
        pickled(folder).write_bytes(forged[:-2] + sound[end:])
        manifest_anew(folder)
        refused(tmp_path / "run", because="its mark is not that of one.pickled.ckpt with these")

    def test_every_changed_byte(self, tmp_path, folder):
        """None is outside of what is marked; nothing but the mark's own form is tolerated."""
        data = pickled(folder).read_bytes()
        assert judge(data, pickled(folder).name, None).authentic
        for place in range(0, len(data), 7):
            changed = bytearray(data)
            changed[place] ^= 1
            assert not judge(bytes(changed), pickled(folder).name, None).authentic
        assert not judge(data + b" ", pickled(folder).name, None).authentic
        assert not judge(data[:-1], pickled(folder).name, None).authentic
        assert not judge(b"", pickled(folder).name, None).authentic

    def test_swapped_files(self, tmp_path, folder):
        """A mark belongs to the name of its file."""
        first, second = pickled(folder, "one"), pickled(folder, "two")
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
        manifest_anew(folder)
        refused(tmp_path / "run", "one", "two", because="its mark is not that of")

    def test_a_mark_by_a_secret_of_the_forgers(self, tmp_path, folder, monkeypatch):
        """Another user's own files are not this user's."""
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "forger"))
        forged = save(tmp_path / "forged", one="x")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        pickled(folder).write_bytes(pickled(forged).read_bytes())
        manifest_anew(folder)
        refused(tmp_path / "run", because="marked with a secret that is not known here")

    def test_what_is_held_is_told_without_control_characters(self, tmp_path, monkeypatch):
        """Whoever wrote the mark: its text is shown in an error."""
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "forger"))
        holds = Holds()
        holds.state_dict = lambda: {"\x1b[2Jword\n" + "x" * 10**5: Word("a")}
        Checkpointer(tmp_path / "run", {"one": holds}).save_checkpoint()
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        with pytest.raises(UntrustedPickleError) as caught:
            load(tmp_path / "run")
        assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)
        assert len(str(caught.value)) < 2000

    def test_a_valid_file_beside_another_state(self, tmp_path, folder):
        """Its places are not there: that is damage, and nothing is handed on."""
        other = Holds()
        other.state_dict = lambda: {"other": 1}
        plain = Checkpointer(tmp_path / "other", {"one": other}).save_checkpoint().path
        (folder / "one.ckpt").write_bytes((plain / "one.ckpt").read_bytes())
        manifest_anew(folder)
        with pytest.raises(DamagedCheckpointError, match="does not belong to the file"):
            load(tmp_path / "run")

    def test_a_link_in_its_place(self, tmp_path, folder):
        """A link could lead to another file of this user's."""
        other = save(tmp_path / "other", one="x")
        pickled(folder).unlink()
        pickled(folder).symlink_to(pickled(other))
        with pytest.raises((DamagedCheckpointError, UntrustedPickleError)):
            load(tmp_path / "run")

    def test_the_file_of_an_earlier_checkpoint(self, tmp_path, folder):
        """It is accepted: a mark says who wrote a file of that name, not when. See SECURITY.md."""
        earlier = save(tmp_path / "earlier", one="earlier")
        pickled(folder).write_bytes(pickled(earlier).read_bytes())
        manifest_anew(folder)
        assert load(tmp_path / "run") == [Word("earlier")]

    def test_what_is_judged_is_what_is_unpickled(self, tmp_path, folder, monkeypatch):
        """A file that is replaced after it was judged is not read again."""
        from lightning_sbckpt._format import load as reading

        def judge_and_replace(*args):
            found = judge(*args)
            torch.save({("word",): Forged()}, pickled(folder))
            return found

        monkeypatch.setattr(reading, "judge", judge_and_replace)
        assert load(tmp_path / "run") == [Word("a")]

    def test_trust_reads_what_has_no_mark(self, tmp_path, folder):
        """As before there were marks."""
        torch.save({("word",): Word("trusted")}, pickled(folder))
        manifest_anew(folder)
        with trusting_pickle():
            assert load(tmp_path / "run") == [Word("trusted")]


class TestSecrets:
    """Where they come from, and when they are not used."""

    def test_one_is_made_that_only_the_user_can_read(self, tmp_path, home):
        """When the first file is marked, and not before."""
        with Checkpointer(tmp_path / "plain", {"one": Holds("plain")}) as saver:
            saver.save_checkpoint()
        assert not home.exists()
        save(tmp_path / "run", one="a")
        found = home / "lightning-sbckpt" / "secrets"
        assert found == user_file()
        assert stat.S_IMODE(found.stat().st_mode) == 0o600
        assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700
        assert len(found.read_text().strip()) == 64
        assert os.listdir(found.parent) == ["secrets"]

    def test_reading_makes_none(self, tmp_path, home, monkeypatch):
        """A reader has nothing to mark."""
        save(tmp_path / "run", one="a")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
        refused(tmp_path / "run", because=r"there is no secret in .*other/lightning-sbckpt/secrets")
        assert not (tmp_path / "other").exists()

    def test_two_machines_that_share_a_secret(self, tmp_path, monkeypatch):
        """By the environment."""
        monkeypatch.setenv(SECRET, A_SECRET)
        save(tmp_path / "run", one="a")
        assert not user_file().exists()
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
        assert load(tmp_path / "run") == [Word("a")]
        monkeypatch.setenv(SECRET, ANOTHER)
        refused(tmp_path / "run", because=f"share the secret: copy its file, or set {SECRET}")

    def test_a_secret_in_a_file_that_the_environment_names(self, tmp_path, monkeypatch):
        """As clusters and containers mount them."""
        file = tmp_path / "mounted"
        file.write_text(A_SECRET)
        file.chmod(0o400)
        monkeypatch.setenv(SECRET_FILE, str(file))
        save(tmp_path / "run", one="a")
        assert not user_file().exists()
        monkeypatch.delenv(SECRET_FILE)
        monkeypatch.setenv(SECRET, A_SECRET)
        assert load(tmp_path / "run") == [Word("a")]

    def test_an_old_secret_is_kept_for_reading(self, tmp_path, home):
        """The last line marks what is new; a line that is taken out is not accepted any more."""
        save(tmp_path / "old", one="old")
        file = user_file()
        old = file.read_text()
        file.write_text(f"# in May\n{old}\n{A_SECRET}\n")
        save(tmp_path / "new", one="new")
        assert load(tmp_path / "old") == [Word("old")] and load(tmp_path / "new") == [Word("new")]
        file.write_text(f"{A_SECRET}\n")
        assert load(tmp_path / "new") == [Word("new")]
        refused(tmp_path / "old")

    def test_the_users_own_secrets_count_beside_those_of_the_environment(
        self, tmp_path, monkeypatch
    ):
        """What was saved before the variable was set is read back."""
        save(tmp_path / "run", one="a")
        monkeypatch.setenv(SECRET, f"{ANOTHER} {A_SECRET}")
        assert load(tmp_path / "run") == [Word("a")]
        save(tmp_path / "more", one="b")
        monkeypatch.setenv(SECRET, A_SECRET)
        assert load(tmp_path / "more") == [Word("b")]

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
    def test_a_file_that_others_can_use_is_not_used(self, tmp_path, caplog, mode):
        """It is said once, with what to do; nothing is marked by it, nothing read by it."""
        save(tmp_path / "run", one="a")
        user_file().chmod(mode)
        refused(tmp_path / "run", because=rf"can be used by others \(mode 0{mode:o}\): chmod 600")
        save(tmp_path / "more", one="b")
        (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert "one['word'] (a Word)" in warning and "chmod 600" in warning
        user_file().chmod(0o600)
        another_process()
        refused(tmp_path / "more", because="marked with a secret that is not known")

    def test_a_file_of_another_user_is_not_used(self, tmp_path, monkeypatch):
        """Who could have written it could forge a mark."""
        save(tmp_path / "run", one="a")
        owner = os.stat(user_file()).st_uid  # noqa: PTH116
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        if owner == 0:
            os.chown(user_file(), 12345, -1)
        refused(tmp_path / "run", because="belongs to another user")

    def test_a_file_among_the_checkpoints_is_not_used(self, tmp_path, monkeypatch, caplog):
        """It would be copied and shared with them."""
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "run"))
        save(tmp_path / "run", one="a")
        assert "lies in a folder of checkpoints" in caplog.text
        assert not user_file().exists()
        user_file().parent.mkdir()
        user_file().write_text(A_SECRET)
        user_file().chmod(0o600)
        another_process()  # As in another process.
        refused(tmp_path / "run", because="lies in a folder of checkpoints")

    @pytest.mark.parametrize("content", ["", "short\n", f"{A_SECRET}\nshort\n", "# none\n"])
    def test_a_file_that_holds_no_secrets_is_not_used(self, tmp_path, monkeypatch, content):
        """Guessing a short one takes no time."""
        monkeypatch.setattr(keys_module, "_ATTEMPTS", 1)
        save(tmp_path / "run", one="a")
        user_file().write_text(content)
        refused(tmp_path / "run", because="does not hold secrets, one a line")

    @pytest.mark.parametrize("home_is", ["read-only", "a file", "missing"])
    def test_where_none_can_be_made_it_is_said_once(self, tmp_path, monkeypatch, caplog, home_is):
        """The process that saved still reads what it saved; another one needs trust."""
        if home_is == "read-only":
            make = Path.mkdir

            def refuse(path, *args, **options):
                if "config" in path.parts:
                    raise OSError(30, "Read-only file system")
                make(path, *args, **options)

            monkeypatch.setattr(Path, "mkdir", refuse)
        elif home_is == "a file":
            (tmp_path / "config").write_text("")
        else:
            monkeypatch.delenv("XDG_CONFIG_HOME")

            def no_home():
                raise RuntimeError("Could not determine home directory.")

            monkeypatch.setattr(Path, "home", no_home)
        root = tmp_path / "run"
        os.mkdir(root)  # noqa: PTH102
        with Checkpointer(root, {"one": Holds(Word("a")), "two": Holds(Word("b"))}) as saver:
            saver.save_checkpoint()
            saver.save_checkpoint()
        (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert "one['word'] (a Word); two['word'] (a Word)" in warning
        assert "trust_pickle=True" in warning and SECRET in warning
        assert load(root) == [Word("a")]
        another_process()  # As in another process.
        refused(root, because="marked with a secret that is not known here")

    @pytest.mark.parametrize(
        ("name", "value", "because"),
        [
            (SECRET, "short", "at least 32 characters"),
            (SECRET_FILE, "/nowhere/secrets", "there is no secret in /nowhere/secrets"),
        ],
    )
    def test_a_variable_that_names_none_is_an_error(
        self, tmp_path, monkeypatch, name, value, because
    ):
        """Who sets it wants it used."""
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigurationError, match=because):
            save(tmp_path / "run", one="a")

    @pytest.mark.long
    def test_processes_that_begin_together_agree(self, tmp_path, home):
        """Each makes the first secret, one of them wins, and all use that one."""
        code = (
            "import sys, time; from lightning_sbckpt._format.keys import keys\n"
            "print('ready', flush=True); sys.stdin.readline(); "
            "print(keys(None, create=True).marking[-1].decode(), keys(None, create=True).problem)"
        )
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(3)
        ]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        found = {process.communicate()[0] for process in processes}
        assert found == {f"{user_file().read_text().strip()} None\n"}

    def test_all_ranks_of_a_job_read_what_rank_zero_saves(self, tmp_path, monkeypatch):
        """On machines that share no secret, too; the secret that lasts is not sent."""
        sent = []

        class Ranks:
            """Two ranks, of which this is one after the other."""

            rank, size = 0, 2

            def broadcast(self, obj):
                sent.append(obj)
                return sent[0]

        share_with_ranks(Ranks())
        save(tmp_path / "run", one="a")
        assert user_file().read_text().strip() not in str(sent)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
        another_process()
        share_with_ranks(Ranks())
        assert load(tmp_path / "run") == [Word("a")]
        another_process()
        refused(tmp_path / "run")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        assert load(tmp_path / "run") == [Word("a")]

    def test_without_hard_links_one_is_made_too(self, tmp_path, monkeypatch):
        """On filesystems that have none."""

        def refuse(*_args):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", refuse)
        save(tmp_path / "run", one="a")
        assert stat.S_IMODE(user_file().stat().st_mode) == 0o600
        assert load(tmp_path / "run") == [Word("a")]
