"""`prune`, `pin`, `unpin`, `annotate`: the commands that change a folder."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._layout.history import History, read_history
from lightning_sbckpt.expressions import parse_predicate
from lightning_sbckpt.retention import Newest
from lightning_sbckpt.retention.noted import run_rules

HOLD = """
import sys
from lightning_sbckpt import Checkpointer
checkpointer = Checkpointer(sys.argv[1])
checkpointer.claim()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(run):
    """Another process that saves to the folder."""
    command = [sys.executable, "-c", HOLD, str(run)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.communicate()


def names(run):
    return sorted(path.name for path in run.glob("CKPT*"))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


class TestPrune:
    """`prune`."""

    def test_without_yes_nothing_is_changed(self, run, call, tree_bytes):
        """It says what would be done and what that would free."""
        before = tree_bytes(run)
        result = call("prune", run, "--keep", "Newest(1)")
        assert tree_bytes(run) == before
        assert "a dry run: 2 of 3 checkpoints would go, " in result.stdout
        assert "--yes removes them" in result.stdout
        assert "goes: older than the newest 1" in result.stdout

    def test_with_yes_it_is_done_and_noted(self, run, call):
        """With the reason, as when a run prunes."""
        result = call("prune", run, "--keep", "Newest(1)", "--yes")
        assert names(run) == ["CKPT+e4"]
        assert "removed 2 of 3 checkpoints, " in result.stdout
        last = [event for event in read_history(run) if event["event"] == "removed"][-1]
        assert last["reason"] == "older than the newest 1"
        assert not (run / ".lock").exists()

    def test_the_rules_of_the_run_stay_its_rules(self, run, call):
        """What was done once by hand is not what the run follows."""
        before = run_rules(run)
        call("prune", run, "--keep", "Newest(1)", "--yes")
        assert run_rules(run) == before
        assert len(before.rules) == 2

    @pytest.mark.parametrize("by_hand", [False, True])
    def test_what_the_run_may_not_remove_stays(self, run, call, by_hand):
        """Its `ckpt_predicate` counts as its rules do, unless rules are given by hand."""
        History(run).kept_by([Newest(1)], parse_predicate("epoch > 1"))
        given = ["--keep", "Newest(1)"] if by_hand else []
        call("prune", run, *given, "--yes")
        assert names(run) == (["CKPT+e4"] if by_hand else ["CKPT+e1", "CKPT+e4"])
        assert run_rules(run).only == "epoch > 1"
        assert "goes: older" not in call("ls", run).stdout

    def test_a_condition_that_is_a_function_can_t_be_followed(self, run, call):
        """Nothing is removed, and nothing is said of what stays."""
        with Checkpointer(run) as checkpointer:
            checkpointer.apply_retention([Newest(1)], ckpt_predicate=lambda ckpt: False)
        said = call("prune", run, "--yes", code=2).stderr
        assert "the rule ckpt_predicate=a function of the run can't be read back" in said
        assert names(run) == ["CKPT+e1", "CKPT+e3", "CKPT+e4"]
        assert "what stays is not known" in call("ls", run).output

    def test_by_default_the_rules_are_those_of_the_run(self, run, call):
        """They keep all there is."""
        assert (
            "nothing to remove: what is there stays, 3 checkpoints"
            in call("prune", run, "--yes").stdout
        )
        with Checkpointer(run) as checkpointer:
            checkpointer.save_checkpoint({"val_loss": 0.8}, name="e5")
        call("prune", run, "--yes")
        assert names(run) == ["CKPT+e1", "CKPT+e3", "CKPT+e5"]

    def test_keys_keep_the_newest_too(self, run, call):
        """As the keywords of the Checkpointer do."""
        result = call("prune", run, "--min-key", "val_loss", "--yes")
        assert "newest  stays: newest 1\n" in result.stdout
        assert names(run) == ["CKPT+e3", "CKPT+e4"]

    def test_a_number_alone_keeps_the_newest(self, run, call):
        """As delete_checkpoints(num_to_keep=2) does."""
        call("prune", run, "--num-to-keep", 2, "--yes")
        assert names(run) == ["CKPT+e3", "CKPT+e4"]

    def test_without_rules_it_refuses(self, run, call):
        """Everything would stay, or everything go: nobody knows."""
        (run / "HISTORY.jsonl").unlink()
        result = call("prune", run, "--yes", code=2)
        assert "nothing was removed" in result.stderr
        assert "no rules were given, and the run noted none" in result.stderr

    def test_with_a_rule_that_cannot_be_read_back_it_refuses(self, run, call):
        """The others alone would remove what that one keeps."""
        History(run).kept_by([Newest(1), object()])
        said = call("prune", run, "--yes", code=2).stderr
        assert "the rule <object object" in said
        assert len(names(run)) == 3

    def test_pinned_ones_stay(self, run, call):
        """Whatever the rules."""
        call("pin", run / "CKPT+e1", "--reason", "in the paper")
        result = call("prune", run, "--keep", "Newest(1)", "--yes")
        assert names(run) == ["CKPT+e1", "CKPT+e4"]
        assert "stays: pinned: in the paper" in result.stdout

    def test_the_newest_that_is_whole_stays_unless_told_otherwise(self, run, call):
        """A damaged one is nothing to resume from."""
        rule = ["--keep", 'Best("val_loss", 1)']
        flip(run / "CKPT+e4" / "model.ckpt")
        flip(run / "CKPT+e3" / "model.ckpt")
        result = call("prune", run, *rule)
        (line,) = [line for line in result.stdout.splitlines() if line.startswith("e1 ")]
        assert line.endswith("stays: the newest that is whole, to resume from")
        call("prune", run, *rule, "--yes")
        assert names(run) == ["CKPT+e1", "CKPT+e3"]
        call("prune", run, *rule, "--also-newest", "--yes")
        assert names(run) == ["CKPT+e3"]

    def test_what_another_run_wrote_stays_unless_told_otherwise(self, run, call):
        """And an average, which somebody made by hand."""
        with Checkpointer(run) as checkpointer:
            for name, lineage in (
                ("other", {"run": "x"}),
                ("average", {"averaged-from": ["CKPT+e1", "CKPT+e3"]}),
                ("mine", {}),
            ):
                checkpointer.lineage = dict(lineage)
                checkpointer.save_checkpoint({"val_loss": 1.0}, name=name)
        result = call("prune", run, "--keep", "Newest(1)", "--yes")
        assert names(run) == ["CKPT+average", "CKPT+mine", "CKPT+other"]
        assert "another run wrote it" in result.stdout
        call("prune", run, "--keep", "Newest(1)", "--all-runs", "--yes")
        assert names(run) == ["CKPT+mine"]

    def test_a_better_one_of_another_run_does_not_take_the_place_of_the_best(self, run, call):
        """Each run has its own best: what the run itself would keep, the command keeps."""
        with Checkpointer(run) as checkpointer:
            for name, loss, of_run in (("other", 0.0, "x"), ("best", 0.1, "y"), ("last", 1.0, "y")):
                checkpointer.lineage = {"run": of_run}
                checkpointer.save_checkpoint({"val_loss": loss}, name=name)
        result = call("prune", run, "--keep", 'Best("val_loss", 1)', "--also-newest", "--yes")
        assert {"CKPT+other", "CKPT+best"} <= set(names(run))
        assert "CKPT+last" not in names(run)
        assert "another run wrote it" in result.stdout

    @pytest.mark.long
    def test_while_a_run_saves_it_exits_with_3_and_says_who(self, run, held, call):
        """Nothing is removed and nothing is noted."""
        history = (run / "HISTORY.jsonl").read_bytes()
        said = call("prune", run, "--keep", "Newest(1)", "--yes", code=3).stderr
        assert f"in use by process {held.pid}" in said
        assert len(names(run)) == 3
        assert (run / "HISTORY.jsonl").read_bytes() == history
        call("prune", run, "--keep", "Newest(1)")

    def test_what_is_freed_counts_shared_bytes_once_and_only_if_all_go(self, run, call):
        """A file goes with the last of its names."""
        shared = run / "CKPT+e1" / "big.bin"
        shared.write_bytes(b"x" * 3_000_000)
        (run / "CKPT+e3" / "big.bin").hardlink_to(shared)
        both = json.loads(call("prune", run, "--keep", "Newest(1)", "--json").stdout)
        assert 3_000_000 <= both["bytes_freed"] < 3_100_000
        one = json.loads(call("prune", run, "--min-key", "val_loss", "--json").stdout)
        assert one["bytes_freed"] < 100_000

    def test_as_json_it_is_the_plan(self, run, call):
        """And whether it was carried out."""
        found = json.loads(call("prune", run, "--keep", "Newest(1)", "--json").stdout)
        assert found["removed"] is False
        assert found["plan"][0] == {
            "name": "CKPT+e4",
            "stays": True,
            "reason": "among the newest 1",
        }
        assert json.loads(call("prune", run, "--keep", "Newest(1)", "--yes", "--json").stdout)[
            "removed"
        ]
        assert names(run) == ["CKPT+e4"]


class TestPinAndAnnotate:
    """`pin`, `unpin`, `annotate`."""

    def test_pins_hold_until_they_are_taken_away(self, run, call):
        """Several at once."""
        call("pin", run / "CKPT+e1", run / "best", "--reason", "mine")
        found = json.loads(call("ls", run, "--json").stdout)["checkpoints"]
        assert [each["meta"].get("pinned") for each in found] == [None, "mine", "mine"]
        assert call("unpin", run / "CKPT+e1").stdout == "unpinned CKPT+e1\n"
        assert call("unpin", run / "CKPT+e1").stdout == "not pinned anyway: CKPT+e1\n"

    def test_a_misspelt_one_pins_none(self, run, call):
        """All of them are looked up first."""
        call("pin", run / "CKPT+e1", run / "CKPT+nowhere", code=2)
        assert not (run / "CKPT+e1" / "ANNOTATIONS.yaml").exists()

    @pytest.mark.sample(6)
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("31.5", 31.5),
            ("3", 3),
            ("1e-3", 1e-3),
            ("-2.5E4", -25000.0),
            ("true", True),
            ("null", None),
            ("good", "good"),
            ("'3'", "3"),
            ("2026-03-04", "2026-03-04"),
            ("a: [", "a: ["),
            ("", None),
            ("x=y", "x=y"),
            (".nan", "nan"),
        ],
    )
    def test_values_are_read_as_in_yaml(self, text, value, run, call):
        """A number is a number, and ranking sees it."""
        call("annotate", run / "CKPT+e1", f"key={text}")
        meta = json.loads(call("show", run / "CKPT+e1", "--json").stdout)["meta"]
        assert meta["key"] == value
        assert type(meta["key"]) is type(value)

    def test_a_metric_that_came_later_ranks(self, run, call):
        """As if it had been saved with the checkpoint."""
        call("annotate", run / "CKPT+e1", "bleu=31.5", "chrf=60")
        call("annotate", run / "CKPT+e4", "bleu=30")
        assert call("best", run, "--max-key", "bleu").stdout.endswith("CKPT+e1\n")

    def test_it_says_what_was_added(self, run, call):
        """In one line."""
        text = call("annotate", run / "newest", "a=1", "--note", "why", "--tag", "x").stdout
        assert text == "annotated CKPT+e4: a 1, a note, tag x\n"

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ([], "nothing to annotate"),
            (["key"], "'key' can't be annotated: expected KEY=VALUE"),
            (["=3"], "'=3' can't be annotated"),
            (["key=[1, 2]"], "its value is a list"),
            (["pinned=1"], "'pinned'"),
        ],
    )
    def test_what_can_not_be_meant_is_refused(self, args, said, run, call):
        """And nothing is written."""
        assert said in call("annotate", run / "CKPT+e1", *args, code=2).stderr
        assert not (run / "CKPT+e1" / "ANNOTATIONS.yaml").exists()

    def test_as_json_they_say_what_was_done(self, run, call):
        """With the paths, which scripts go on with."""
        e1, e3 = str(run / "CKPT+e1"), str(run / "CKPT+e3")
        found = [
            json.loads(call(command, e1, run / "best", "--json").stdout)
            for command in ("pin", "unpin")
        ]
        assert found[0] == [{"path": e1, "pinned": True}, {"path": e3, "pinned": True}]
        assert found[1] == [{"path": e1, "pinned": False}, {"path": e3, "pinned": False}]
        assert json.loads(call("annotate", e1, "a=1", "--tag", "x", "--json").stdout) == {
            "path": e1,
            "meta": {"a": 1},
            "note": None,
            "tags": ["x"],
        }

    @pytest.mark.long
    def test_a_run_that_saves_does_not_mind(self, run, held, call):
        """What is noted of a checkpoint is beside what the run writes."""
        call("pin", run / "CKPT+e1")
        call("annotate", run / "CKPT+e1", "a=1")
        call("unpin", run / "CKPT+e1")
