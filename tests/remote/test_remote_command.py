"""The command on URLs, in processes of its own: it reads, changes and refuses as on folders."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from lightning_sbckpt.cli import main
from lightning_sbckpt.retention import Best, Newest
from remote._machines import Machines, environment, filled, find_by_environment

LOSSES = (0.9, 0.5, 0.7, 0.4, 0.6)


@pytest.fixture
def bucket(server, request):
    name = f"cli-{abs(hash(request.node.nodeid)) % 10**9}"
    server.bucket(name)
    return name


@pytest.fixture
def machines(server, bucket, tmp_path):
    return Machines(f"{server.url(bucket)}/run", server.options, tmp_path)


@pytest.fixture
def run(machines):
    """Of five epochs three are left: e1 and e3 are the best two, e4 is the newest."""
    with machines.another({"model": filled(1.0)}) as checkpointer:
        for epoch, loss in enumerate(LOSSES):
            meta = {"epoch": epoch, "global_step": 100 * epoch, "val_loss": loss}
            checkpointer.save_checkpoint(meta, name=f"e{epoch}")
            checkpointer.apply_retention([Best("val_loss", 2), Newest(1)])
    return machines.url


@pytest.fixture
def call(server, tmp_path, monkeypatch):
    """Run the command in this process, on a machine that has seen nothing before."""
    find_by_environment(server, tmp_path / "cache", monkeypatch)
    monkeypatch.chdir(tmp_path)

    def invoke(*args, code=0):
        result = CliRunner().invoke(main, [str(arg) for arg in args])
        assert isinstance(result.exception, (SystemExit, type(None))), result.exception
        assert result.exit_code == code, result.output
        return result

    return invoke


def call_process(server, cache, *args, code=0, **changed):
    """Run the command as a shell does."""
    done = subprocess.run(
        [sys.executable, "-m", "lightning_sbckpt.cli", *map(str, args)],
        env={**environment(server, cache), **changed},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.sample(1)
def test_a_shell_finds_the_store_by_its_environment(run, server, tmp_path):
    """And a script gets the URL of the best checkpoint, which it can give to anything else."""
    done = call_process(server, tmp_path / "cache", "best", run)
    assert done.stdout == f"{run}/CKPT+e3\n"
    assert done.stderr == ""


@pytest.mark.sample(1)
def test_looking_tells_what_is_there_and_writes_nothing(run, machines, call, tmp_path):
    """`ls`, `best`, `show`, `verify`, `plot`, `watch`: by the URL, and called by it."""
    before = machines.objects()
    listed = json.loads(call("ls", run, "--json").stdout)
    assert listed["folder"] == run
    assert [each["name"] for each in listed["checkpoints"]] == ["CKPT+e4", "CKPT+e3", "CKPT+e1"]
    assert [each["marks"] for each in listed["checkpoints"]] == [["newest"], ["best"], []]
    # The files are not here, and their sizes are known.
    assert all(each["bytes"] > 600_000 for each in listed["checkpoints"])
    assert call("best", run).stdout.strip() == f"{run}/CKPT+e3"
    shown = call("show", f"{run}/best").stdout
    assert shown.startswith(f"{run}/CKPT+e3")
    assert "in the store, not looked into" in shown
    assert "model.ckpt" in shown
    assert "400 x 400" in call("show", f"{run}/CKPT+e3", "--keys", "*").stdout
    assert "3 sound" in call("verify", run).stdout
    assert call("plot", run, "-o", "out.png").stdout.strip() == "out.png"
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert call("report", run, "-o", "out.html").stdout.strip() == "out.html"
    assert f"{run}/CKPT+e3" in (tmp_path / "out.html").read_text()
    assert "\ne4 " in call("watch", run, "--once").stdout
    assert "not among the 2 best val_loss" in call("ls", run, "--removed").stdout
    assert machines.objects() == before


def test_changing_changes_the_store(run, machines, call):
    """`pin`, `annotate`, `prune`: another machine sees it."""
    assert "pinned CKPT+e1" in call("pin", f"{run}/CKPT+e1", "--reason", "in the paper").stdout
    call("annotate", f"{run}/newest", "bleu=31.5")
    assert "a dry run" in call("prune", run, "--keep", "Newest(1)").stdout
    other = machines.another(access="read")
    metas = {ckpt.path.name: ckpt.meta for ckpt in other.list_checkpoints()}
    assert metas["CKPT+e1"]["pinned"] == "in the paper"
    assert metas["CKPT+e4"]["bleu"] == 31.5
    assert "removed 1 of 3" in call("prune", run, "--keep", "Newest(1)", "--yes").stdout
    assert [ckpt.path.name for ckpt in other.list_checkpoints()] == ["CKPT+e1", "CKPT+e4"]


@pytest.mark.sample(1)
def test_what_was_made_of_it_is_what_is_there(run, call, tmp_path):
    """`diff`, `export` and `average` bring what they read."""
    assert "equal" in call("diff", f"{run}/CKPT+e1", "CKPT+e3", "--name", "model").stdout
    call("export", f"{run}/best", "model.pt")
    assert (tmp_path / "model.pt").stat().st_size > 600_000
    said = call("average", run, "--newest", "2", "--name", "mean").stdout.strip()
    assert said == f"{run}/CKPT+mean"
    names = [each["name"] for each in json.loads(call("ls", run, "--json").stdout)["checkpoints"]]
    assert "CKPT+mean" in names


@pytest.mark.sample(1)
def test_damage_in_the_store_is_an_answer_of_verify(run, machines, call):
    """With the exit code for it."""
    machines.flip_a_byte("CKPT+e4/model.ckpt")
    assert "2 sound, 1 damaged" in call("verify", run, code=1).stdout


@pytest.mark.sample(1)
@pytest.mark.parametrize("server", ["s3"], indirect=True)
@pytest.mark.parametrize(
    ("path", "code", "said"),
    [
        ("s3://nowhere/run", 3, "there is no bucket 'nowhere'"),
        ("s3://{bucket}/other", 2, "there are no checkpoints in s3://{bucket}/other"),
        ("s3://{bucket}/run/CKPT+e1", 2, "is one checkpoint: expected the folder of all of them"),
        ("nosuch://x/run", 2, "fsspec knows no store for nosuch://"),
        ("gs://x/run", 2, "pip install 'lightning-sbckpt[gcs]'"),
    ],
)
def test_a_wrong_url_is_one_line_with_its_code(path, code, said, run, bucket, call):
    """What it says names the URL."""
    if path.startswith("gs:"):
        try:
            import gcsfs  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("gcsfs is installed")
    done = call("ls", path.format(bucket=bucket), code=code)
    assert said.format(bucket=bucket) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.sample(1)
def test_who_names_the_run_where_a_checkpoint_is_meant_is_told(run, call):
    """And how to name one."""
    done = call("show", run, code=2)
    assert (
        f"{run} is a folder of checkpoints: name one of them, such as {run}/newest" in done.stderr
    )
    done = call("show", f"{run}/CKPT+e0", code=2)
    assert f"there is no checkpoint CKPT+e0 in {run}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_a_server_that_does_not_answer_is_said_in_bounded_time(run, server, tmp_path):
    """Not waited for, and not taken for an empty one."""
    nobody = {"FSSPEC_S3_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = call_process(server, tmp_path, "ls", run, code=3, **nobody)
    assert f"can't list {run}" in done.stderr.strip().splitlines()[-1]
