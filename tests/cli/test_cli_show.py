"""`show` and `best`: one checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from _foreign import forget_manifest

from lightning_sbckpt import Checkpointer
from lightning_sbckpt.meta import Checkpoint


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


class TestShow:
    """`show`."""

    def test_it_shows_meta_files_and_tensors(self, run, call):
        """A person sees what is in the folder."""
        call("annotate", run / "CKPT+e3", "bleu=31.5", "--note", "for the paper", "--tag", "good")
        text = call("show", run / "CKPT+e3").stdout
        lines = [line.split() for line in text.splitlines()]
        assert ["val_loss", "0.4"] in lines
        assert ["bleu", "31.5"] in lines
        assert any(words[0] == "notes" and "for the paper" in " ".join(words) for words in lines)
        assert any(words[-1] == "model.ckpt" for words in lines)
        assert ["model:", "2", "tensors,", "8", "numbers"] in lines
        assert ["weight", "2", "x", "3", "float32"] in lines
        assert ["bias", "2", "float32"] in lines

    @pytest.mark.parametrize("word", ["best", "newest", "CKPT+e3", "e3"])
    def test_the_last_part_may_be_a_word(self, word, run, call):
        """Best is by the first rule Best(...) of the run."""
        name = {"newest": "e4"}.get(word, "e3")
        assert call("show", run / word).stdout.splitlines()[0] == str(run / f"CKPT+{name}")

    def test_what_best_means_must_be_known(self, run, call):
        """Without a rule nobody knows."""
        (run / "HISTORY.jsonl").unlink()
        assert "what is best in" in call("show", run / "best", code=2).stderr

    def test_a_folder_of_checkpoints_is_not_one(self, run, call):
        """The line says what to write."""
        assert f"such as {run / 'newest'}" in call("show", run, code=2).stderr

    def test_no_tensor_is_read(self, run, call, tmp_path, monkeypatch):
        """A file of 40 GB without a byte on the disk is shown at once."""
        huge = torch.empty(10_000_000_000, device="meta")
        shown = []

        def opened(self, name):
            shown.append(name)
            return {"layers": [{"huge": huge}], "half": torch.zeros(2, dtype=torch.bfloat16)}

        monkeypatch.setattr(Checkpoint, "open", opened)
        text = call("show", run / "CKPT+e3").stdout
        assert shown == ["model"]
        assert "layers/0/huge  10000000000     float32" in text
        assert "half           2               bfloat16" in text

    def test_keys_choose_tensors_and_nothing_else_is_shown(self, run, call):
        """With or without the name of the file."""
        for pattern in ("w*", "model/weight"):
            lines = call("show", run / "CKPT+e3", "--keys", pattern).stdout.splitlines()
            assert lines[0] == "model: 1 tensor, 6 numbers"
            assert [line.split()[0] for line in lines[1:]] == ["weight"]
        assert (
            "has a name that fits 'x*'"
            in call("show", run / "CKPT+e3", "--keys", "x*", code=1).stderr
        )

    def test_many_tensors_are_shown_only_when_asked_for(self, tmp_path, call):
        """The first few give an idea."""
        model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(20)))
        saved = Checkpointer(tmp_path, {"model": model}).save_checkpoint(name="a")
        text = call("show", saved.path).stdout
        assert "and 28 more: --keys 'model/*'" in text
        assert "19.bias" not in text
        assert "19.bias" in call("show", saved.path, "--keys", "model/*").stdout

    def test_as_json_it_has_all_of_it(self, run, call):
        """For scripts."""
        found = json.loads(call("show", run / "CKPT+e3", "--json").stdout)
        assert found["meta"]["val_loss"] == 0.4
        assert found["files"]["model.ckpt"] == (run / "CKPT+e3" / "model.ckpt").stat().st_size
        assert found["tensors"]["model"][0] == {
            "name": "weight",
            "shape": [2, 3],
            "dtype": "float32",
        }
        assert found["unreadable"] == {}

    def test_a_file_that_cannot_be_read_is_said_and_the_rest_is_shown(self, run, call):
        """Nothing of it is executed."""
        (run / "CKPT+e3" / "model.ckpt").write_bytes(b"nonsense")
        text = call("show", run / "CKPT+e3").stdout
        assert "val_loss" in text
        assert "model: " in text
        assert "model.ckpt can't be read by torch.load" in text

    def test_a_checkpoint_without_manifest_is_said_to_be_unverified(self, run, call):
        """As SpeechBrain's are."""
        forget_manifest(run / "CKPT+e3")
        assert "it has no manifest" in call("show", run / "CKPT+e3").stdout

    def test_names_inside_files_do_not_steer_the_terminal(self, tmp_path, call):
        """They are anybody's."""
        saved = Checkpointer(tmp_path).save_checkpoint({"\x1b[2Jkey": "\x1b[31m"}, name="a")
        torch.save({"\x1b[2Jw": torch.zeros(1)}, saved.path / "model.ckpt")
        text = call("show", saved.path).stdout
        assert "\x1b" not in text
        assert "\\x1b[2Jw" in text


class TestBest:
    """`best`."""

    @pytest.mark.parametrize(
        ("args", "name"),
        [
            (["--min-key", "val_loss"], "e3"),
            (["--max-key", "val_loss"], "e4"),
            (["--max-key", "acc", "--where", "epoch != 3"], "e1"),
            ([], "e3"),
        ],
    )
    def test_the_path_stands_alone(self, args, name, run, call):
        """Ready for $(...)."""
        assert call("best", run, *args).stdout == f"{run / f'CKPT+{name}'}\n"

    def test_without_key_and_rule_it_is_the_newest(self, run, call):
        """As find_checkpoint has it."""
        (run / "HISTORY.jsonl").unlink()
        assert call("best", run).stdout.endswith("CKPT+e4\n")

    def test_none_is_the_answer_no(self, run, call):
        """Nothing on stdout, or a script would go on with it."""
        result = call("best", run, "--where", "epoch > 7", code=1)
        assert result.stdout == ""
        assert "for which epoch > 7" in result.stderr

    def test_sound_steps_over_damaged_ones(self, run, call):
        """And says so where it does no harm."""
        flip(run / "CKPT+e3" / "model.ckpt")
        assert call("best", run).stdout.endswith("CKPT+e3\n")
        result = call("best", run, "--sound")
        assert result.stdout == f"{run / 'CKPT+e1'}\n"
        assert "stepped over CKPT+e3: model.ckpt has other bytes" in result.stderr
        for name in "14":
            flip(run / f"CKPT+e{name}" / "model.ckpt")
        assert "all 3 candidates in" in call("best", run, "--sound", code=1).stderr

    def test_a_script_gets_the_very_path(self, tmp_path, call):
        """Whatever characters are in it."""
        odd = tmp_path / "a\tb\u202e"
        Checkpointer(odd).save_checkpoint(name="a")
        assert call("best", odd).stdout == f"{odd / 'CKPT+a'}\n"

    def test_two_keys_are_refused(self, run, call):
        """They may contradict each other."""
        said = call("best", run, "--min-key", "acc", "--max-key", "acc", code=2).stderr
        assert "may contradict each other" in said

    def test_as_json_it_says_by_what(self, run, call):
        """With the meta."""
        found = json.loads(call("best", run, "--json").stdout)
        assert found["by"] == "lowest val_loss"
        assert found["meta"]["epoch"] == 3
