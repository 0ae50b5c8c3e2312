"""One checkpoint, line or rule that makes no sense hides no healthy one."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from lightning_sbckpt import Checkpointer, cli
from lightning_sbckpt._layout.history import HISTORY_NAME, read_history
from lightning_sbckpt.errors import MetaError, SelectionError
from lightning_sbckpt.inspect import table
from lightning_sbckpt.meta import Checkpoint, parse_yaml
from lightning_sbckpt.report import report
from lightning_sbckpt.retention import parse_rule, plan_retention

COMMANDS = [
    ["ls"],
    ["ls", "--json"],
    ["ls", "--where", "loss < 9"],
    ["ls", "--removed"],
    ["prune", "--min-key", "loss"],
    ["best", "--min-key", "loss"],
    ["verify"],
]


@pytest.fixture
def root(tmp_path, scale):
    """A folder with two healthy checkpoints and one to be made strange."""
    root = tmp_path / "run"
    checkpointer = Checkpointer(root, {"model": scale(1.0)})
    for name in ("strange", "b", "c"):
        checkpointer.save_checkpoint({"loss": 1.0}, name=name)
    checkpointer.close()
    return root


def look(root):
    """Run every command that looks at a folder; each ends as it should, with the healthy ones."""
    for command in COMMANDS:
        result = CliRunner().invoke(cli.main, [command[0], str(root), *command[1:]])
        assert result.exit_code in (0, 1), (command, result.output, result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit), command
        if command[0] == "ls" and "--removed" not in command:
            assert "c" in result.output
    for name in ("strange", "c"):
        result = CliRunner().invoke(cli.main, ["show", str(root / f"CKPT+{name}")])
        assert result.exit_code in (0, 1, 2, 3), result.output
        assert isinstance(result.exception, (SystemExit, type(None)))
    checkpointer = Checkpointer(root, access="read")
    assert {"b", "c"} <= {ckpt.path.name[5:] for ckpt in checkpointer.list_checkpoints()}
    assert checkpointer.find_checkpoint(min_key="loss") is not None
    assert "c" in table(checkpointer.list_checkpoints())
    report(root)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "line",
    [
        "1: 2",
        "null: 2",
        "true: 2",
        "1.5: 2",
        "2026-01-01: 2",
        "!!binary aGk=: 2",
        "? [1, 2]\n: 3",
        f"0x{'f' * 900}: 2",
        f"steps: 0x{'f' * 900}",
        f"0x{'f' * 90000}: 2",
        f"steps: {'9' * 5000}",
        "steps: 1" + ":1" * 100_000,
        "scores: {'!tensor': float32, shape: [0, 1000000000], data: []}",
        "scores: {1: 2, null: [3]}",
        "day: 2026-01-01",
        "epoch: 1e308",
        "names: !!set {a, b}",
    ],
    ids=lambda line: line[:20],
)
def test_strange_meta_breaks_no_command(root, line):
    """Keys that are no text, numbers of thousands of digits, empty tensors of enormous shapes."""
    meta = root / "CKPT+strange" / "CKPT.yaml"
    meta.write_text(meta.read_text() + line + "\n")
    began = time.process_time()
    look(root)
    assert time.process_time() - began < 30


@pytest.mark.long
def test_hundred_thousand_keys_are_listed_in_time_that_grows_with_their_number(root):
    """They are columns for most of which there is no room."""
    meta = root / "CKPT+strange" / "CKPT.yaml"
    meta.write_text(meta.read_text() + "".join(f"k{number}: 1\n" for number in range(100_000)))
    began = time.process_time()
    result = CliRunner().invoke(cli.main, ["ls", str(root)])
    assert time.process_time() - began < 30
    assert result.exit_code == 0
    assert " more" in result.output
    assert len(result.output) < 100_000


def test_key_that_is_no_text_is_taken_by_its_text():
    """So that it can be listed, asked for and written as JSON like any other."""
    assert parse_yaml(b"unixtime: 1.0\n1: 2\nnull: 3\n", "CKPT.yaml") == {
        "unixtime": 1.0,
        "1": 2,
        "None": 3,
    }


def test_number_of_thousands_of_digits_is_refused_at_once():
    """To make it would take the square of its length."""
    began = time.process_time()
    with pytest.raises(MetaError, match="a number of 2,000,001 characters"):
        parse_yaml(b"unixtime: 1" + b":1" * 1_000_000, "CKPT.yaml")
    assert time.process_time() - began < 10


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "rule",
    [
        "EveryNEpochs(2, key={})",
        "EveryNSteps(2, key=[])",
        "EveryNEpochs(2, first_epoch='a')",
        "Milestones([1], key=3)",
        "Milestones([10**400])",
        "EveryNSteps(1" + "0" * 400 + ")",
        "Newest(1" + "0" * 4000 + ")",
        "Budget('1 GB', bytes_of=[1])",
        "TimeSpaced('10 min', factor=[2])",
        "Newest(" + "-" * 100_000 + "1)",
        "Where('" + "(" * 5000 + "')",
        "Pareto('a', modes=[[]])",
    ],
    ids=lambda rule: rule[:30],
)
def test_strange_rule_in_the_history_breaks_no_command(root, rule):
    """It is a rule that can't be read back, and nothing rests on it."""
    with pytest.raises(SelectionError):
        parse_rule(rule)
    with (root / HISTORY_NAME).open("a") as stream:
        stream.write(json.dumps({"event": "rules", "time": 1.0, "rules": [rule]}) + "\n")
    look(root)


def any_literal(rng, depth=0):
    kinds = [0, 1, 2, 3] + [4, 5, 6] * (depth < 2)
    return [
        lambda: rng.choice([0, 1, 3, -1, 2**70, True, None]),
        lambda: rng.choice([0.5, 1e308, -1.0, 3.0]),
        lambda: rng.choice(["loss", "epoch", "10 min", "1 GB", "min", "steps", "", "loss > 1"]),
        lambda: rng.choice([b"x", 1j, ...]),
        lambda: [any_literal(rng, depth + 1) for _ in range(rng.randrange(3))],
        lambda: (any_literal(rng, depth + 1),),
        lambda: {"a": any_literal(rng, depth + 1)},
    ][rng.choice(kinds)]()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_taken_for_a_rule_can_be_asked(seed):
    """A rule is refused when it is read, or it plans any checkpoints without an error of Python's."""
    rng = random.Random(seed)
    names = ["Best", "Budget", "EveryNEpochs", "EveryNSteps", "Milestones", "Newest"]
    names += ["Pareto", "TimeSpaced", "Where"]
    options = ["n", "key", "mode", "ephemeral", "first_epoch", "unit", "factor", "modes", "every"]
    taken = 0
    for _ in range(1500):
        given = [repr(any_literal(rng)) for _ in range(rng.randrange(1, 3))]
        given += [f"{rng.choice(options)}={any_literal(rng)!r}"] * rng.randrange(2)
        try:
            rule = parse_rule(f"{rng.choice(names)}({', '.join(given)})")
        except SelectionError:
            continue
        taken += 1
        metas = [
            {"unixtime": rng.choice([1.0, 2, 1e308, -5.0, "soon"]), "loss": any_literal(rng)}
            | {"epoch": any_literal(rng), "global_step": rng.choice([10**900, 3, 0.5, None])}
            for _ in range(4)
        ]
        ckpts = [Checkpoint(Path(root), meta, {}) for root, meta in zip("abcd", metas, strict=True)]
        try:
            plan_retention(ckpts, [rule], bytes_of=lambda _: {})
        except SelectionError:
            continue
    assert taken > 10


def test_history_of_nothing_costs_nothing(root):
    """Empty lines, lists and halves of lines are passed over as fast as they are read."""
    with (root / HISTORY_NAME).open("ab") as stream:
        stream.write(b"\n" * 8_000_000 + b"[]\n" * 1_000_000 + b'{"event": "saved", "time": 1')
    began = time.process_time()
    events = read_history(root)
    assert [event["name"] for event in events] == ["CKPT+strange", "CKPT+b", "CKPT+c"]
    assert time.process_time() - began < 2


@pytest.mark.sample(3)
@pytest.mark.parametrize("when", ["NaN", "Infinity", "1e400", "-5", "1" + "0" * 400, "true", '"a"'])
def test_event_at_no_time_is_left_out(root, when):
    """A time that no date can have would end whatever draws it."""
    with (root / HISTORY_NAME).open("a") as stream:
        stream.write(f'{{"event": "removed", "time": {when}, "name": "x", "reason": "y"}}\n')
    assert len(read_history(root)) == (4 if when == "true" else 3)
    look(root)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "meta",
    [
        {"note": "caf\udce9"},
        {"caf\udce9": 1},
        {"notes": ["a", {"b": "\ud800"}]},
        {"text": "x" * (17 * 2**20)},
    ],
    ids=["text", "key", "inside", "large"],
)
def test_meta_that_could_not_be_read_again_is_refused_before_anything_is_written(
    tmp_path, scale, meta
):
    """A checkpoint that nobody can read would stand in the place of a good one."""
    checkpointer = Checkpointer(tmp_path / "run", {"model": scale(1.0)})
    checkpointer.save_checkpoint(name="a")
    with pytest.raises(MetaError):
        checkpointer.save_checkpoint(meta, name="a")
    assert [ckpt.meta.get("note") for ckpt in checkpointer.list_checkpoints()] == [None]
    checkpointer.recover_if_possible()


def test_deep_meta_is_refused_before_anything_is_written(tmp_path, scale):
    """Also meta that holds itself, which has no end."""
    checkpointer = Checkpointer(tmp_path / "run", {"model": scale(1.0)})
    deep = []
    for _ in range(150):
        deep = [deep]
    endless = []
    endless.append(endless)
    for value in (deep, endless):
        with pytest.raises(MetaError, match="deep or holds itself"):
            checkpointer.save_checkpoint({"value": value})
    assert checkpointer.list_checkpoints() == []


def test_note_that_could_not_be_read_again_leaves_the_earlier_ones(tmp_path, scale):
    """What was annotated before stays, and can be added to."""
    checkpointer = Checkpointer(tmp_path / "run", {"model": scale(1.0)})
    saved = checkpointer.save_checkpoint()
    checkpointer.annotate(saved, {"bleu": 31.5})
    for wrong in ({"note": "caf\udce9"}, {"tags": ["caf\udce9"]}):
        with pytest.raises(MetaError, match="not Unicode"):
            checkpointer.annotate(saved, {}, **wrong)
    with pytest.raises(MetaError, match="not Unicode"):
        checkpointer.pin(saved, "caf\udce9")
    checkpointer.annotate(saved, {"wer": 0.1})
    (found,) = checkpointer.list_checkpoints()
    assert (found.meta["bleu"], found.meta["wer"], found.meta.get("pinned")) == (31.5, 0.1, None)
