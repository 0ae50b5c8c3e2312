"""`diff`, `average` and `export` on the command line."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from _python import python
from _releases import needs_torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._layout.manifest import read_manifest
from lightning_sbckpt.retention import Best

VALUES = {"a": 1.0, "b": 2.0, "c": 6.0}


@pytest.fixture
def root(tmp_path):
    """Three checkpoints, a model of 1, 2 and 6, of which b has the lowest loss."""
    model = torch.nn.Linear(2, 1)
    head = torch.nn.Linear(1, 1)
    with Checkpointer(tmp_path / "run", {"model": model, "head": head}) as checkpointer:
        for epoch, (name, value) in enumerate(VALUES.items()):
            torch.nn.init.constant_(model.weight, value)
            meta = {"epoch": epoch, "loss": (value - 2.2) ** 2}
            checkpointer.save_checkpoint(meta, name=name)
    return tmp_path / "run"


def weight(path):
    return torch.load(path / "model.ckpt")["weight"][0, 0].item()


# ---------------------------------------------------------------------- diff


def test_diff_shows_what_differs_and_says_so_to_scripts(root, call):
    """Meta, files, and the tensors by how much they changed; exit code 1."""
    lines = call("diff", root / "CKPT+a", root / "CKPT+c", code=1).stdout.splitlines()
    assert lines[0] == f"A  {root / 'CKPT+a'}"
    assert lines[1] == f"B  {root / 'CKPT+c'}"
    assert "  meta epoch: 0 -> 2" in lines
    assert "head: same bytes" in lines
    assert "model: 1 changed, 1 tensors equal" in lines
    (row,) = [line.split() for line in lines if line.startswith("  weight")]
    assert row == ["weight", "1x2", "float32", "100%", "5", "5"]
    assert lines[-1] == "different"


def test_diff_shows_the_model_before_the_machinery_of_a_run(tmp_path, call):
    """Its tensors first, then what else learns; of the loops only how much, unless asked for."""
    for name, value in (("p", 1.0), ("q", 2.0)):
        weight = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(weight.weight, value)
        files = dict.fromkeys(("loops", "ema", "model"), weight)
        with Checkpointer(tmp_path, files) as checkpointer:
            checkpointer.save_checkpoint(name=name)
    lines = call("diff", tmp_path / "p", "q", code=1).stdout.splitlines()
    assert [line.split()[0] for line in lines if "float32" in line or "changed" in line] == [
        *("model:", "tensor", "weight", "ema:", "tensor", "weight", "loops:")
    ]
    assert lines[-2:] == ["loops: 1 changed (more: --name loops)", "different"]
    in_full = call("diff", tmp_path / "p", "q", "--name", "loops", code=1).stdout
    assert "  weight" in in_full


def test_equal_checkpoints_exit_with_zero(root, call):
    """Although they were saved at different times."""
    with Checkpointer(root, {"x": torch.nn.Linear(1, 1)}) as checkpointer:
        for name in ("p", "q"):
            checkpointer.save_checkpoint({"epoch": 9}, name=name)
    result = call("diff", root / "CKPT+p", root / "CKPT+q", code=0)
    assert result.stdout.splitlines()[-1] == "equal"


@pytest.mark.parametrize("which", ["CKPT+b", "b", "{root}/CKPT+b"])
def test_the_second_may_be_a_name_beside_the_first(root, call, which):
    """With or without CKPT+, or a path."""
    result = call("diff", root / "CKPT+a", which.format(root=root), "--json", code=1)
    assert json.loads(result.stdout)["after"] == str(root / "CKPT+b")


def test_the_newest_is_found_by_the_word(root, call):
    """For either side."""
    result = call("diff", root / "newest", "newest", "--json", code=0)
    assert json.loads(result.stdout)["before"] == str(root / "CKPT+c")


def test_diff_prints_all_of_it_as_json(root, call):
    """In numbers, not in words."""
    found = json.loads(call("diff", root / "CKPT+a", "b", "--json", code=1).stdout)
    (head, model) = sorted(found["files"], key=lambda file: file["name"])
    assert head["same_bytes"] is True
    assert model["changed"] == [
        {
            "name": "weight",
            "shape": [1, 2],
            "dtype": "float32",
            "elements": 2,
            "changed": 2,
            "largest": 1.0,
            "relative": 1.0,
        }
    ]
    assert found["equal"] is False


def test_diff_looks_only_at_what_it_is_told(root, call):
    """A pattern of tensors, a file, or the meta alone."""
    call("diff", root / "CKPT+a", "b", "--keys", "bias", code=0)
    call("diff", root / "CKPT+a", "b", "--keys", "weight", code=1)
    call("diff", root / "CKPT+a", "b", "--name", "head", code=0)
    output = call("diff", root / "CKPT+a", "b", "--meta-only", code=1).stdout
    assert "meta epoch: 0 -> 1" in output
    assert "model" not in output
    refused = call("diff", root / "CKPT+a", "b", "--meta-only", "--keys", "x", code=2)
    assert "--meta-only leaves out" in refused.stderr


def test_long_lists_are_cut_with_a_word(root, call):
    """To the largest changes, as many as wanted."""
    for name, scale in (("p", 1.0), ("q", 2.0)):
        layers = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False) for _ in range(5)])
        for layer in layers:
            torch.nn.init.constant_(layer.weight, scale)
        with Checkpointer(root, {"m": layers}) as checkpointer:
            checkpointer.save_checkpoint(name=name)
    output = call("diff", root / "CKPT+p", "q", "--top", "2", code=1).stdout
    assert sum("float32" in line for line in output.splitlines()) == 2
    assert "... and 3 more tensors that changed less" in output


@needs_torch("2.8", "torch.float4_e2m1fn_x2")
def test_every_kind_of_difference_has_a_line(tmp_path, call):
    """What came, what went, other shapes, other values, and what could not be compared."""

    class State:
        def __init__(self, state):
            self.state = state

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    fp4 = [torch.full((1,), n, dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for n in (1, 2)]
    one = torch.ones(1)
    states = (
        {"m": {"gone": one, "s": one, "v": 1, "z": torch.zeros(1), "f": fp4[0]}, "old": {"w": one}},
        {
            "m": {"new": one, "s": torch.ones(2), "v": 2, "z": one, "f": fp4[1]},
            "ema": {"w": one},
        },
    )
    for name, files in zip("pq", states, strict=True):
        recoverables = {key: State(state) for key, state in files.items()}
        with Checkpointer(tmp_path, recoverables) as checkpointer:
            checkpointer.save_checkpoint({f"only-{name}": 1}, name=name)
    lines = call("diff", tmp_path / "CKPT+p", "q", code=1).stdout.splitlines()
    for line in (
        "  meta only-p: only in A",
        "  meta only-q: only in B",
        "old: only in A",
        "ema: only in B",
        "  gone: only in A",
        "  new: only in B",
        "  s: float32 (1) -> float32 (2)",
        "  v: 1 -> 2",
        "  f: its bytes differ, and torch can't compute with float4_e2m1fn_x2",
    ):
        assert line in lines
    assert any(line.startswith("  z ") and line.endswith("was zero") for line in lines)


def test_diff_of_nothing_is_wrong_usage(root, call):
    """A wrong name suggests another, an unknown file names those there are."""
    assert "there is no checkpoint" in call("diff", root / "CKPT+a", "zz", code=2).stderr
    assert "can't compare 'x'" in call("diff", root / "CKPT+a", "b", "--name", "x", code=2).stderr


# ---------------------------------------------------------------------- average


def test_average_prints_the_path_of_the_new_checkpoint(root, call):
    """And nothing else, so that a script can use it."""
    path = call("average", root, "a", "CKPT+b", root / "CKPT+c", "--name", "mean").stdout
    assert path == f"{root / 'CKPT+mean'}\n"
    assert weight(root / "CKPT+mean") == 3.0
    assert read_manifest(root / "CKPT+mean").lineage == {
        "averaged-from": ["CKPT+a", "CKPT+b", "CKPT+c"]
    }


@pytest.mark.parametrize(
    ("options", "mean"),
    [
        (["--best", "2", "--min-key", "loss"], 1.5),
        (["--best", "2", "--max-key", "loss"], 3.5),
        (["--newest", "2"], 4.0),
        (["--best", "1", "--min-key", "loss"], 2.0),
    ],
)
def test_average_chooses_by_key_or_by_time(root, call, options, mean):
    """As many as wanted."""
    call("average", root, *options, "--name", "mean")
    assert weight(root / "CKPT+mean") == mean


def test_the_best_are_those_of_the_run_s_own_rules(root, call):
    """Where it noted some; else it has to be said."""
    refused = call("average", root, "--best", "2", code=2)
    assert "Say it with --min-key KEY or --max-key KEY" in refused.stderr
    with Checkpointer(root) as checkpointer:
        checkpointer.apply_retention([Best("loss", 3, mode="max")])
    call("average", root, "--best", "2", "--name", "mean")
    assert weight(root / "CKPT+mean") == 3.5


def test_averages_are_not_averaged_again_unless_named(root, call):
    """And it is said when there are fewer than wanted."""
    call("average", root, "a", "c", "--name", "first")
    result = call("average", root, "--newest", "9", "--name", "second")
    assert weight(root / "CKPT+second") == 3.0
    assert "9 were asked for, and there are 3" in result.stderr
    call("average", root, "first", "second", "--name", "third")
    assert weight(root / "CKPT+third") == 3.25


def test_average_takes_other_files_and_places_when_told(root, call, tmp_path):
    """Other recoverables, the rest of the newest source, another folder; and JSON."""
    call("average", root, "a", "b", "--recoverable", "head", "--name", "heads")
    assert not (root / "CKPT+heads" / "model.ckpt").exists()
    options = ["--with-rest", "--into", tmp_path / "out", "--name", "m", "--json"]
    found = json.loads(call("average", root, "a", "b", *options).stdout)
    assert found["path"] == str(tmp_path / "out" / "CKPT+m")
    assert found["meta"]["averaged-epochs"] == [0, 1]
    assert (tmp_path / "out" / "CKPT+m" / "head.ckpt").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "name the checkpoints to average, or give --best N, or --newest N"),
        (["a", "--newest", "2"], "one of them"),
        (["--newest", "2", "--best", "2"], "one of them"),
        (["a", "--min-key", "loss"], "give --best N with them"),
        (["--best", "2", "--min-key", "los"], "no checkpoint has the key 'los'"),
        (["zz"], "there is no checkpoint zz"),
        (["a", "b", "--name", "c"], "exists already. Give it another name"),
        (["a", "b", "--recoverable", "net"], "Cannot average 'net'"),
    ],
)
def test_average_refuses_what_cannot_be_meant(root, call, words, complaint):
    """In one line, with exit code 2; nothing is saved."""
    assert complaint in call("average", root, *words, code=2).stderr
    assert len(list(root.glob("CKPT*"))) == 3


def test_average_leaves_a_folder_in_use_to_its_run(root):
    """Exit code 3, by the name of the process."""
    checkpointer = Checkpointer(root)
    checkpointer.claim()
    done = python("-m", "lightning_sbckpt.cli", "average", root, "a", "b")
    assert done.returncode == 3
    assert done.stderr.startswith("Error: ")
    assert len(list(root.glob("CKPT*"))) == 3


# ---------------------------------------------------------------------- export


@pytest.mark.parametrize(
    ("out", "options", "kind"),
    [
        ("m.pt", [], "state-dict"),
        ("m.pth", [], "state-dict"),
        ("m", ["--format", "state-dict"], "state-dict"),
        ("m.safetensors", [], "safetensors"),
        ("m.pt", ["--format", "safetensors"], "safetensors"),
        ("m.ckpt", [], "lightning"),
        ("m.x", ["--format", "lightning"], "lightning"),
    ],
)
def test_export_writes_the_format_of_the_ending_or_the_one_it_is_told(
    root, call, tmp_path, out, options, kind
):
    """And prints the path."""
    path = tmp_path / out
    assert call("export", root / "CKPT+c", path, *options).stdout == f"{path}\n"
    found = safetensors.torch.load_file(path) if kind == "safetensors" else torch.load(path)
    state = found["state_dict"] if kind == "lightning" else found
    assert state["weight"][0, 0] == 6.0


def test_export_chooses_recoverable_and_tensors(root, call, tmp_path):
    """By name and by pattern."""
    options = ["--name", "head", "--keys", "b*"]
    call("export", root / "CKPT+a", tmp_path / "h.safetensors", *options)
    assert list(safetensors.torch.load_file(tmp_path / "h.safetensors")) == ["bias"]
    call("export", root / "CKPT+a", tmp_path / "h.pt", "--name", "head")
    assert torch.load(tmp_path / "h.pt")["weight"].shape == (1, 1)


def test_export_says_what_is_not_in_the_file(root, call, tmp_path):
    """On stderr, and in JSON."""
    result = call("export", root / "newest", tmp_path / "m.ckpt")
    assert result.stderr.startswith("Note: no fit can go on from it")
    again = call("export", root / "newest", tmp_path / "m.ckpt", "--overwrite", "--json")
    found = json.loads(again.stdout)
    assert found["path"] == str(tmp_path / "m.ckpt")
    assert found["remarks"][0].startswith("no fit can go on from it")


@pytest.mark.parametrize(
    ("out", "options", "complaint"),
    [
        ("m.zip", [], "tells no format: say it with --format"),
        ("m.ckpt", ["--name", "head"], "--name is for one recoverable"),
        ("m.pt", ["--keys", "x"], "--keys is for safetensors"),
        ("m.safetensors", ["--trust-pickle"], "--trust-pickle is of no use"),
        ("m.pt", ["--name", "net"], "no recoverable 'net' to export"),
        ("there.pt", [], "is there already"),
    ],
)
def test_export_refuses_what_cannot_be_meant(root, call, tmp_path, out, options, complaint):
    """In one line, with exit code 2; nothing is written."""
    (tmp_path / "there.pt").write_text("mine")
    assert complaint in call("export", root / "CKPT+a", tmp_path / out, *options, code=2).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there.pt"]
    assert (tmp_path / "there.pt").read_text() == "mine"


def test_a_damaged_checkpoint_is_not_exported(root, call, tmp_path):
    """Exit code 1: the answer is no."""
    file = root / "CKPT+a" / "model.ckpt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    result = call("export", root / "CKPT+a", tmp_path / "m.pt", code=1)
    assert "model.ckpt has other bytes" in result.stderr
    assert not (tmp_path / "m.pt").exists()
