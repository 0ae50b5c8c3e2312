"""Folders made by an enemy: no code runs, nothing outside is touched, the healthy rest works on."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import socket
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from _foreign import describe, forget_manifest
from click.testing import CliRunner

from lightning_sbckpt import Checkpointer, cli
from lightning_sbckpt._io.storage import FileDigest, digest, digest_bytes
from lightning_sbckpt._layout.manifest import Manifest, dump_manifest
from lightning_sbckpt.averaging import save_average
from lightning_sbckpt.errors import SBCheckpointError, UntrustedPickleError
from lightning_sbckpt.inspect import table
from lightning_sbckpt.meta import dump_meta
from lightning_sbckpt.verify import verify

# Newer than anything that is saved here, so that it is tried first.
LATER = {"unixtime": 4e9, "end-of-epoch": True, "loss": 0.0}


@pytest.fixture(autouse=True)
def patience():
    """What waits for ever fails, with the place at which it waits."""

    def give_up(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def canary(tmp_path):
    """The folder that every payload would make."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


@pytest.fixture
def outside(tmp_path, tree_bytes):
    """A folder outside of the root, which stays as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    (folder / "CKPT.yaml").write_bytes(dump_meta(LATER))
    torch.save({"param": torch.tensor([666.0])}, folder / "model.ckpt")
    before = tree_bytes(folder)
    yield folder
    assert tree_bytes(folder) == before


@pytest.fixture
def run(tmp_path):
    """The folder of all checkpoints."""
    return tmp_path / "run"


@pytest.fixture
def make(run, scale):
    """A function that returns a new checkpointer of the run with its model."""

    def new():
        model = scale(0.0)
        return Checkpointer(run, {"model": model}), model

    return new


@pytest.fixture
def healthy(make):
    """A sound checkpoint of a model with the value 1."""
    checkpointer, model = make()
    model.value = 1.0
    return checkpointer.save_checkpoint({"loss": 1.0}, name="healthy")


@pytest.fixture
def hostile(run, healthy, scale):
    """A newer checkpoint beside the healthy one, yet to be made hostile."""
    saved = Checkpointer(run, {"model": scale(666.0)}).save_checkpoint(name="hostile")
    (saved.path / "CKPT.yaml").write_bytes(dump_meta(LATER))
    describe(saved.path)
    return saved.path


def look_at_everything(root):
    """Read a folder in every way there is; only our own errors may come of it."""
    checkpointer = Checkpointer(root)
    for look in (
        checkpointer.list_checkpoints,
        checkpointer.find_checkpoint,
        lambda: checkpointer.find_checkpoint(min_key="loss"),
        checkpointer.find_sound_checkpoint,
        lambda: verify(root),
        lambda: table(checkpointer.list_checkpoints(), min_key="loss"),
        lambda: checkpointer.delete_checkpoints(num_to_keep=1, dry_run=True),
    ):
        with contextlib.suppress(SBCheckpointError):
            look()
    for command in (["verify", str(root)], ["verify", "--json", str(root)]):
        result = CliRunner().invoke(cli.main, command)
        assert isinstance(result.exception, (SystemExit, type(None))), result.exception


def prune_everything(root):
    """Delete what may be deleted."""
    Checkpointer(root).delete_checkpoints(num_to_keep=0)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def torch_file(payload):
    """A torch file whose pickle holds it."""
    buffer = io.BytesIO()
    torch.save({"param": torch.tensor([1.0]), "evil": payload}, buffer)
    return buffer.getvalue()


def legacy_file(payload):
    """A torch file as it was before torch 1.6."""
    buffer = io.BytesIO()
    torch.save({"param": payload}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def bare_pickle(payload):
    """A pickle of the oldest protocol, which begins with no mark."""
    return pickle.dumps({"param": payload}, protocol=0)


def newest_pickle(payload):
    """A pickle of the newest protocol."""
    return pickle.dumps({"param": payload}, protocol=pickle.HIGHEST_PROTOCOL)


def tar_file(payload):
    """A torch file as it was before torch 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            data = pickle.dumps(payload)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def yaml_tag(payload):
    """A tag that makes a careless YAML loader call a function."""
    return (
        f"unixtime: 5.0\nend-of-epoch: true\nevil: !!python/object/apply:os.mkdir "
        f"['{payload.target}']\n"
    ).encode()


CODE = [torch_file, legacy_file, bare_pickle, newest_pickle, tar_file, yaml_tag]
PLACES = [
    "CKPT+hostile/model.ckpt",
    "CKPT+hostile/model+pickled.ckpt",
    "CKPT+hostile/CKPT.yaml",
    "CKPT+hostile/MANIFEST.yaml",
    "CKPT+hostile/ANNOTATIONS.yaml",
    ".index.json",
    ".lock",
    "HISTORY.jsonl",
    ".staging+x/CKPT.yaml",
]


# All of them take a minute; each kind and each place is there once in a run without the slow ones.
EVERYWHERE = [
    pytest.param(
        place,
        code,
        described,
        id=f"{place}-{code.__name__}-{'described' if described else 'no manifest'}",
        marks=[] if (i + j + described) % len(CODE) == 0 else [pytest.mark.slow],
    )
    for i, place in enumerate(PLACES)
    for j, code in enumerate(CODE)
    for described in (True, False)
]


class TestCode:
    """Code in every place where a file is read."""

    @pytest.mark.sample(8)
    @pytest.mark.parametrize(("place", "code", "described"), EVERYWHERE)
    def test_none_of_it_runs(self, run, make, hostile, canary, place, code, described):
        """Whether the manifest vouches for it or is missing; and the next save works."""
        file = run / place
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(code(Payload(canary)))
        if described and place != "CKPT+hostile/MANIFEST.yaml":
            describe(hostile)
        elif not described and place != "CKPT+hostile/MANIFEST.yaml":
            forget_manifest(hostile)
        look_at_everything(run)
        checkpointer, model = make()
        with contextlib.suppress(SBCheckpointError):
            checkpointer.recover_if_possible()
        assert model.value in (0.0, 1.0, 666.0)
        saved = checkpointer.save_checkpoint()
        assert saved in checkpointer.list_checkpoints()
        prune_everything(run)

    @pytest.mark.parametrize("code", CODE[:4], ids=lambda code: code.__name__)
    def test_a_careless_reader_would_have_run_it(self, tmp_path, code):
        """So the test above can fail."""
        (tmp_path / "file").write_bytes(code(Payload(tmp_path / "would-be-canary")))
        with contextlib.suppress(Exception):
            torch.load(tmp_path / "file", weights_only=False)
        with contextlib.suppress(Exception):
            pickle.loads((tmp_path / "file").read_bytes())
        assert (tmp_path / "would-be-canary").is_dir()

    def test_pickles_beside_the_one_of_a_torch_file_are_not_read(self, hostile, make, canary):
        """A zip file may hold any number of them."""
        with zipfile.ZipFile(hostile / "model.ckpt", "a") as archive:
            top = archive.namelist()[0].partition("/")[0]
            for name in ("evil.pkl", f"{top}/evil.pkl", f"{top}/data/evil.pkl", f"{top}/code.pkl"):
                archive.writestr(name, pickle.dumps(Payload(canary)))
        describe(hostile)
        checkpointer, model = make()
        with contextlib.suppress(SBCheckpointError):
            checkpointer.recover_if_possible()
        assert model.value in (0.0, 666.0)

    def test_a_second_data_pkl_is_not_the_one_that_runs(self, hostile, make, canary):
        """Two entries of one name, the later one hostile: torch and zip tools may differ on it."""
        with zipfile.ZipFile(hostile / "model.ckpt", "a") as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr(name, pickle.dumps(Payload(canary)))
        describe(hostile)
        with contextlib.suppress(SBCheckpointError):
            make()[0].recover_if_possible()

    def test_the_refusal_says_that_it_is_about_trust(self, hostile, make, canary):
        """With the file."""
        (hostile / "model.ckpt").write_bytes(torch_file(Payload(canary)))
        describe(hostile)
        checkpointer, model = make()
        with pytest.raises(UntrustedPickleError, match=r"CKPT\+hostile/model\.ckpt.*trust_pickle"):
            checkpointer.recover_if_possible()
        assert model.value == 0.0


def as_pipe(path, outside):
    """A named pipe, on which an open waits for ever."""
    os.mkfifo(path)


def as_socket(path, outside):
    """A socket."""
    # By a short path: an address has room for a hundred characters.
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{short}/s")
        Path(short, "s").rename(path)


def as_link_to_a_device(path, outside):
    """A link to a file without end."""
    path.symlink_to("/dev/zero")


def as_link_to_outside(path, outside):
    """A link to a good file elsewhere."""
    path.symlink_to(outside / ("CKPT.yaml" if path.suffix == ".yaml" else "model.ckpt"))


def as_link_to_itself(path, outside):
    """A link that leads nowhere, in a circle."""
    path.symlink_to(path)


def as_folder(path, outside):
    """A folder, with a link in it."""
    path.mkdir()
    (path / "link").symlink_to(outside)


def as_sparse_terabyte(path, outside):
    """A file that takes no room and would fill the memory."""
    with path.open("wb") as stream:
        stream.truncate(2**40)


OBJECTS = [
    as_pipe,
    as_socket,
    as_link_to_a_device,
    as_link_to_outside,
    as_link_to_itself,
    as_folder,
    as_sparse_terabyte,
]
FILES = ["CKPT.yaml", "MANIFEST.yaml", "ANNOTATIONS.yaml", "model.ckpt"]


@pytest.mark.parametrize("kind", OBJECTS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", FILES)
class TestNoRegularFiles:
    """Something else in the place of a file."""

    @pytest.mark.sample(15)
    def test_it_is_neither_waited_on_nor_followed_nor_loaded(
        self, run, make, healthy, hostile, outside, name, kind
    ):
        """The healthy one is recovered, or what is hostile is only a note beside good files."""
        (hostile / name).unlink(missing_ok=True)
        kind(hostile / name, outside)
        # Verification has its own test: it would read a terabyte.
        checkpointer, model = make()
        assert {ckpt.path for ckpt in checkpointer.list_checkpoints()} >= {healthy.path}
        recovered = checkpointer.recover_if_possible()
        if name == "ANNOTATIONS.yaml":
            assert (recovered.path, model.value) == (hostile, 666.0)
        else:
            assert (recovered.path, model.value) == (healthy.path, 1.0)
        saved = checkpointer.save_checkpoint()
        assert saved in checkpointer.list_checkpoints()

    def test_without_a_manifest_it_is_the_same(
        self, run, make, healthy, hostile, outside, name, kind
    ):
        """Since then nothing vouches for sizes."""
        if name == "MANIFEST.yaml" or (name == "model.ckpt" and kind is as_folder):
            return  # The first is the test above; a hook may have made its file a folder.
        forget_manifest(hostile)
        (hostile / name).unlink(missing_ok=True)
        kind(hostile / name, outside)
        checkpointer, model = make()
        if (name, kind) == ("model.ckpt", as_sparse_terabyte):
            # Nothing tells it from a file of a user's own format; torch has no use for it.
            with pytest.raises(SBCheckpointError, match=r"hostile/model\.ckpt"):
                checkpointer.recover_if_possible()
            return
        recovered = checkpointer.recover_if_possible()
        if name == "ANNOTATIONS.yaml":
            assert (recovered.path, model.value) == (hostile, 666.0)
        else:
            assert (recovered.path, model.value) == (healthy.path, 1.0)

    @pytest.mark.sample(10)
    def test_verification_names_it_and_pruning_removes_it_alone(
        self, run, hostile, healthy, outside, name, kind
    ):
        """Not what it leads to."""
        (hostile / name).unlink(missing_ok=True)
        kind(hostile / name, outside)
        if (name, kind) != ("model.ckpt", as_sparse_terabyte):
            (found,) = [one for one in verify(run) if one.path == hostile]
            damage = found.annotation_problems if name == "ANNOTATIONS.yaml" else found.problems
            assert any(name in problem for problem in damage)
            look_at_everything(run)
        prune_everything(run)
        assert not healthy.path.exists()


class TestLinks:
    """Links that lead out of the folder of all checkpoints."""

    def test_a_link_to_a_checkpoint_is_none(self, run, make, healthy, outside):
        """It isn't listed, loaded or removed."""
        (run / "CKPT+link").symlink_to(outside)
        (run / "CKPT+dangling").symlink_to(outside / "nowhere")
        (run / ".removed+x+CKPT+link").symlink_to(outside)
        look_at_everything(run)
        checkpointer, _ = make()
        assert checkpointer.recover_if_possible() == healthy
        prune_everything(run)
        assert (run / "CKPT+link").is_symlink()

    def test_links_inside_of_leftovers_and_checkpoints_are_removed_as_links(
        self, run, healthy, hostile, outside
    ):
        """To files, to folders, to the folder above."""
        (run / ".removed+1+CKPT+x").mkdir()
        for folder in (hostile, run / ".removed+1+CKPT+x"):
            (folder / "file.ckpt").symlink_to(outside / "mine.txt")
            (folder / "folder").symlink_to(outside)
            (folder / "above").symlink_to("..")
            (folder / "deep").mkdir()
            (folder / "deep" / "folder").symlink_to(outside)
        look_at_everything(run)
        prune_everything(run)
        assert [name for name in os.listdir(run) if name not in {".lock", "HISTORY.jsonl"}] == []

    @pytest.mark.parametrize("described", [True, False])
    def test_a_folder_of_a_hook_that_is_a_link_is_not_followed(
        self, run, make, healthy, hostile, outside, described
    ):
        """Even if the manifest gives the right checksum of what it leads to."""
        (hostile / "model.ckpt").unlink()
        (hostile / "model.ckpt").symlink_to(outside)
        forget_manifest(hostile)
        if described:
            files = {
                "CKPT.yaml": digest(hostile / "CKPT.yaml"),
                "model.ckpt/mine.txt": digest(outside / "mine.txt"),
            }
            (hostile / "MANIFEST.yaml").write_bytes(dump_manifest(Manifest(files, {})))
        checkpointer, model = make()
        assert checkpointer.recover_if_possible() == healthy
        assert model.value == 1.0

    def test_a_link_as_root_is_the_users_own(self, run, healthy, tmp_path, scale):
        """`runs/latest`, say: the user named it."""
        (tmp_path / "latest").symlink_to(run)
        model = scale(0.0)
        checkpointer = Checkpointer(tmp_path / "latest", {"model": model})
        assert checkpointer.recover_if_possible().path.name == "CKPT+healthy"
        assert model.value == 1.0


SIZED = FileDigest(4, "0" * 32)
MANIFESTS = {
    "above": {"../CKPT+healthy/model.ckpt": SIZED},
    "far above": {"../" * 30 + "etc/passwd": SIZED},
    "absolute": {"/etc/passwd": SIZED},
    "inside and out": {"model.ckpt/../../CKPT+healthy/model.ckpt": SIZED},
    "nothing": {"": SIZED},
    "itself": {".": SIZED},
    "nul": {"a\0b": SIZED},
    "no file": {"CKPT.yaml/x": SIZED},
    "too long": {"x" * 5000: SIZED},
    "text as size": {"model.ckpt": FileDigest("4", "0")},
    "truth as size": {"model.ckpt": FileDigest(True, "0")},
    "huge size": {"model.ckpt": FileDigest(10**30, "0")},
    "negative size": {"model.ckpt": FileDigest(-1, "0")},
    "number as checksum": {"model.ckpt": FileDigest(1, 5)},
    "number as name": {5: SIZED},
}


class TestManifests:
    """A manifest may say anything, and its checksum is right."""

    @pytest.mark.parametrize("kind", MANIFESTS)
    def test_it_is_damage_like_any_other(self, run, make, healthy, hostile, kind):
        """Named in a line, stepped over, no file elsewhere looked at."""
        (hostile / "MANIFEST.yaml").write_bytes(dump_manifest(Manifest(MANIFESTS[kind], {})))
        checkpointer, model = make()
        assert checkpointer.recover_if_possible() == healthy
        assert model.value == 1.0
        (found,) = [one for one in verify(run) if one.path == hostile]
        (problem,) = found.problems
        assert "etc/passwd has" not in problem
        look_at_everything(run)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"- 1\n",
            b"format: 1\n",
            b"format: 1\nfiles: [a, b]\nlineage: {}\n",
            b"format: 1\nfiles: {model.ckpt: 5}\nlineage: {}\n",
            b"format: 1\nfiles: {model.ckpt: {size: 5}}\nlineage: {}\n",
            b"format: 1\nfiles: {}\nlineage: [1]\n",
            b"format: [1]\nfiles: {}\n",
            b"format: 1\nfiles: &a {x: *a}\nlineage: {}\n",
            b"format: 1\nfiles: {a: !!python/object/apply:os.abort []}\n",
            b"\xff\xfe\n",
        ],
    )
    def test_one_of_another_shape_is_damage_too(self, run, make, healthy, hostile, body):
        """It never ends in an error of Python."""
        line = f"manifest-checksum: {digest_bytes(body).xxh3_128}\n".encode()
        (hostile / "MANIFEST.yaml").write_bytes(body + line)
        checkpointer, _ = make()
        assert checkpointer.recover_if_possible() == healthy
        look_at_everything(run)

    def test_an_empty_one_vouches_for_nothing(self, run, make, healthy, hostile):
        """A paramfile of which it says nothing is unverified, and read without pickle only."""
        (hostile / "MANIFEST.yaml").write_bytes(dump_manifest(Manifest({}, {})))
        checkpointer, _ = make()
        assert checkpointer.recover_if_possible().path == hostile
        (found,) = [one for one in verify(run) if one.path == hostile]
        assert {remark.split()[0] for remark in found.remarks} == {"CKPT.yaml", "model.ckpt"}


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
)


class TestMetas:
    """Meta that says what no writer would write."""

    @pytest.mark.parametrize(
        "unixtime",
        ["soon", ".nan", ".inf", "-.inf", "1e300", "9" * 400, "[1]", "{a: 1}", "yes", ""],
    )
    def test_a_time_that_is_none_hurts_nobody(self, run, make, healthy, hostile, unixtime):
        """It is listed, ranked, drawn, kept or pruned, and the next save is newer than the rest."""
        (hostile / "CKPT.yaml").write_text(f"unixtime: {unixtime}\nloss: 0.5\n")
        describe(hostile)
        look_at_everything(run)
        checkpointer, model = make()
        model.value = 2.0
        newest = checkpointer.save_checkpoint()
        assert newest.meta["unixtime"] > healthy.meta["unixtime"]
        checkpointer.delete_checkpoints(num_to_keep=2)
        assert newest.path.exists()
        prune_everything(run)

    @pytest.mark.parametrize("how_many", [1, 80])
    def test_aliases_that_grow_without_end_cost_nothing(self, run, make, healthy, how_many):
        """By name, as the key to rank by, in a table, in an index of many."""
        for number in range(how_many):
            folder = run / f"CKPT+bomb{number}"
            folder.mkdir()
            (folder / "CKPT.yaml").write_text("unixtime: 5.0\nend-of-epoch: true\n" + BOMB)
        look_at_everything(run)
        checkpointer, _ = make()
        for key in ("a39", "a0", "loss"):
            with contextlib.suppress(SBCheckpointError):
                checkpointer.find_checkpoint(min_key=key)
            with contextlib.suppress(SBCheckpointError):
                checkpointer.delete_checkpoints(min_keys=[key], dry_run=True)
        assert checkpointer.find_checkpoint(min_key="loss").path == healthy.path

    @pytest.mark.parametrize("value", ["word", "[1, 2]", "{a: 1}", "null", "2026-01-01", "yes"])
    def test_a_value_that_is_no_number_is_said_or_passed_over(
        self, run, make, healthy, hostile, value
    ):
        """When it is what is ranked by."""
        (hostile / "CKPT.yaml").write_text(f"unixtime: 4.0e9\nloss: {value}\n")
        describe(hostile)
        look_at_everything(run)


def names_to_try():
    """Names of folders that a filesystem takes and a program may stumble over."""
    return [
        os.fsdecode(b"CKPT+\xff\xfe"),
        "CKPT+line\nbreak",
        "CKPT+\x1b[31mred",
        "CKPT+[bold]markup",
        "CKPT+" + "x" * 250,
        "CKPT+ ",
        "CKPT+..",
        "CKPT..",
        "CKPT+--json",
        "CKPT+{0}%s%n",
        "CKPT",
        "CKPT+\u202eevil",
    ]


class TestNames:
    """Names of folders and files that no writer of ours makes."""

    @pytest.mark.parametrize("name", names_to_try(), ids=repr)
    def test_a_checkpoint_of_any_name_is_read_and_removed(self, run, make, healthy, outside, name):
        """And verified, drawn and printed, averaged, and a run goes on from it."""
        hostile = run / name
        hostile.mkdir()
        (hostile / "CKPT.yaml").write_bytes(dump_meta(LATER))
        torch.save({"param": torch.tensor([3.0])}, hostile / "model.ckpt")
        look_at_everything(run)
        checkpointer, model = make()
        assert checkpointer.recover_if_possible().path == hostile
        assert model.value == 3.0
        checkpointer.save_checkpoint(name="after")
        checkpointer.close()
        save_average(run, [hostile, run / "CKPT+after"], name="average")
        prune_everything(run)
        assert not hostile.exists()

    @pytest.mark.parametrize("name", [os.fsdecode(b"\xff.ckpt"), "line\nbreak.ckpt", ".ckpt"])
    def test_a_paramfile_of_any_name_is_no_trouble(self, run, make, healthy, hostile, name):
        """It is nobody's."""
        (hostile / name).write_bytes(b"x")
        look_at_everything(run)
        checkpointer, _ = make()
        assert checkpointer.recover_if_possible().path == hostile
        prune_everything(run)

    @pytest.mark.parametrize(
        "name",
        [
            ".replaced+x+..",
            ".replaced+x+.",
            ".replaced+x+",
            ".replaced+",
            ".replaced+x+CKPT+healthy",
            ".removed+..",
            ".staging+..",
        ],
    )
    def test_leftovers_of_any_name_lead_nowhere(self, run, make, healthy, outside, name):
        """The next start clears them, or brings them back under a name inside."""
        (run / name).mkdir()
        (run / name / "CKPT.yaml").write_bytes(dump_meta(LATER))
        around = sorted(os.listdir(run.parent))
        checkpointer, _ = make()
        assert checkpointer.recover_if_possible() == healthy
        assert sorted(os.listdir(run.parent)) == around
        assert not (run / name).exists()

    @pytest.mark.long
    def test_tens_of_thousands_of_entries_hide_no_healthy_one(self, run, make, healthy):
        """Files and folders named like checkpoints among them."""
        for number in range(20_000):
            (run / f"junk{number}").touch()
        for number in range(3_000):
            (run / f"CKPT+file{number}").touch()
            (run / f"CKPT+folder{number}").mkdir()
        checkpointer, _ = make()
        assert checkpointer.recover_if_possible() == healthy
        assert [found.path for found in verify(run)] == [healthy.path]
        checkpointer.delete_checkpoints(num_to_keep=0)
        assert sum(name.startswith(("junk", "CKPT+f")) for name in os.listdir(run)) == 26_000
