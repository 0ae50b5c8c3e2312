"""What SpeechBrain documents about deletion: `delete_checkpoints`, `save_and_keep_only`.

Sources: the docstrings and unit tests of `speechbrain.utils.checkpoints`.

`pytest --original` with this file runs every test against the real SpeechBrain.
"""

from __future__ import annotations

import logging

import pytest
from _numbered import save_losses


class TestDeletion:
    """`delete_checkpoints(*, num_to_keep, min_keys, max_keys, importance_keys, ...)`."""

    def test_the_arguments_are_keyword_only(self, api, tmp_path, scale):
        """Deletion is permanent, so it is spelt out."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        checkpointer.save_checkpoint()
        with pytest.raises(TypeError):
            checkpointer.delete_checkpoints(0)
        assert len(checkpointer.list_checkpoints()) == 1

    def test_the_newest_survives_by_default(self, api, tmp_path, scale):
        """One checkpoint is kept, the newest; the folders of the others are gone."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        first = checkpointer.save_checkpoint()
        checkpointer.delete_checkpoints()
        assert checkpointer.list_checkpoints() == [first]
        second = checkpointer.save_checkpoint()
        checkpointer.delete_checkpoints()
        assert checkpointer.list_checkpoints() == [second]
        assert not first.path.exists()

    def test_num_to_keep_keeps_as_many(self, api, tmp_path, scale):
        """The newest n; fewer if there are fewer."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        ckpts = [checkpointer.save_checkpoint() for _ in range(4)]
        checkpointer.delete_checkpoints(num_to_keep=9)
        assert set(checkpointer.list_checkpoints()) == set(ckpts)
        checkpointer.delete_checkpoints(num_to_keep=2)
        assert set(checkpointer.list_checkpoints()) == set(ckpts[2:])

    def test_num_to_keep_zero_deletes_all_considered(self, api, tmp_path, scale):
        """With a predicate, all for which it is true; without one, everything."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        kept = checkpointer.save_checkpoint(meta={"kind": "full"})
        checkpointer.save_checkpoint(meta={"kind": "fast"})
        checkpointer.delete_checkpoints(
            num_to_keep=0, ckpt_predicate=lambda ckpt: ckpt.meta["kind"] == "fast"
        )
        assert checkpointer.list_checkpoints() == [kept]
        checkpointer.delete_checkpoints(num_to_keep=0)
        assert checkpointer.list_checkpoints() == []
        checkpointer.delete_checkpoints(num_to_keep=0)

    def test_num_to_keep_zero_reaches_what_another_checkpointer_wrote(self, api, tmp_path, scale):
        """A new Checkpointer on the folder of an earlier run can clear it."""
        api.Checkpointer(tmp_path, {"model": scale()}).save_checkpoint()
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        checkpointer.recover_if_possible()
        checkpointer.delete_checkpoints(num_to_keep=0)
        assert checkpointer.list_checkpoints() == []

    def test_a_negative_number_is_refused(self, api, tmp_path, scale):
        """ValueError, and nothing is deleted."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        checkpointer.save_checkpoint()
        with pytest.raises(ValueError, match="keep"):
            checkpointer.delete_checkpoints(num_to_keep=-1)
        assert len(checkpointer.list_checkpoints()) == 1

    def test_the_best_by_min_and_max_keys_are_kept_beside_the_newest(self, api, tmp_path, scale):
        """Each key keeps its own; recency, the default importance key, keeps one too."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        lowest, highest, _, newest = save_losses(checkpointer, [1.0, 9.0, 5.0, 6.0])
        checkpointer.delete_checkpoints(min_keys=["loss"], max_keys=["loss"])
        assert set(checkpointer.list_checkpoints()) == {lowest, highest, newest}

    def test_several_keys_are_kept_as_a_union(self, api, tmp_path, scale):
        """num_to_keep holds for each key; one that is best twice is kept once."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        metas = [
            {"loss": 1.0, "acc": 0.1},
            {"loss": 2.0, "acc": 0.2},
            {"loss": 3.0, "acc": 0.9},
            {"loss": 4.0, "acc": 0.8},
            {"loss": 9.0, "acc": 0.0},
        ]
        a, b, c, d, _ = (checkpointer.save_checkpoint(meta=meta) for meta in metas)
        checkpointer.delete_checkpoints(
            num_to_keep=2, min_keys=["loss"], max_keys=["acc"], importance_keys=[]
        )
        assert set(checkpointer.list_checkpoints()) == {a, b, c, d}
        checkpointer.delete_checkpoints(
            num_to_keep=1,
            min_keys=["loss", "acc"],
            importance_keys=[lambda ckpt: -abs(ckpt.meta["loss"] - 3.0)],
        )
        assert set(checkpointer.list_checkpoints()) == {a, c}

    def test_several_importance_keys_keep_their_own(self, api, tmp_path, scale):
        """Each sort order keeps num_to_keep."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        _, highest, newest = save_losses(checkpointer, [2, 3, 1])
        checkpointer.delete_checkpoints(
            importance_keys=[api.ckpt_recency, lambda ckpt: ckpt.meta["loss"]]
        )
        assert set(checkpointer.list_checkpoints()) == {highest, newest}

    def test_only_those_the_predicate_is_true_for_can_be_deleted(self, api, tmp_path, scale):
        """The others survive and take no place among the kept."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        excluded = checkpointer.save_checkpoint(meta={"kind": "epoch", "foo": 9})
        highest = checkpointer.save_checkpoint(meta={"foo": 2})
        checkpointer.save_checkpoint(meta={"foo": 0})
        newest = checkpointer.save_checkpoint(meta={"foo": 1})
        excluded_too = checkpointer.save_checkpoint(meta={"kind": "epoch"})
        checkpointer.delete_checkpoints(
            max_keys=["foo"], ckpt_predicate=lambda ckpt: "kind" not in ckpt.meta
        )
        assert set(checkpointer.list_checkpoints()) == {excluded, highest, newest, excluded_too}

    def test_without_a_listed_key_a_checkpoint_is_not_considered(self, api, tmp_path, scale):
        """One that no listed key applies to is never deleted."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        without = checkpointer.save_checkpoint()
        other_key = checkpointer.save_checkpoint(meta={"acc": 0.5})
        _, best = save_losses(checkpointer, [2.0, 1.0])
        checkpointer.delete_checkpoints(min_keys=["loss"], importance_keys=[])
        assert set(checkpointer.list_checkpoints()) == {without, other_key, best}
        checkpointer.delete_checkpoints(num_to_keep=0, min_keys=["loss"], importance_keys=[])
        assert set(checkpointer.list_checkpoints()) == {without, other_key}

    def test_without_any_key_nothing_is_considered(self, api, tmp_path, scale):
        """An empty list of importance keys and no other key deletes nothing."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        ckpts = save_losses(checkpointer, [1.0, 2.0])
        checkpointer.delete_checkpoints(num_to_keep=0, importance_keys=[])
        assert set(checkpointer.list_checkpoints()) == set(ckpts)

    def test_ties_keep_the_newer(self, api, tmp_path, scale):
        """Of equally good checkpoints the older goes."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        _, newer, _ = save_losses(checkpointer, [1.0, 1.0, 2.0])
        checkpointer.delete_checkpoints(min_keys=["loss"], importance_keys=[])
        assert checkpointer.list_checkpoints() == [newer]

    @pytest.mark.parametrize("level", [logging.DEBUG, logging.WARNING])
    def test_verbosity_is_the_level_of_the_log_line(
        self, api, tmp_path, scale, caplog, level, all_levels
    ):
        """The line that tells which checkpoint went is logged at that level."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        gone = checkpointer.save_checkpoint()
        checkpointer.save_checkpoint()
        caplog.clear()
        all_levels()
        checkpointer.delete_checkpoints(verbosity=level)
        levels = [rec.levelno for rec in caplog.records if str(gone.path) in rec.getMessage()]
        assert level in levels


class TestSaveAndKeepOnly:
    """`save_and_keep_only` saves, then deletes."""

    def test_it_returns_none(self, api, tmp_path, scale):
        """There is no promise that the saved checkpoint survives."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        assert checkpointer.save_and_keep_only() is None
        assert len(checkpointer.list_checkpoints()) == 1

    def test_by_default_only_the_newest_remains(self, api, tmp_path, scale):
        """One checkpoint, the one just saved."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        for epoch in range(3):
            checkpointer.save_and_keep_only(meta={"epoch": epoch})
            assert [ckpt.meta["epoch"] for ckpt in checkpointer.list_checkpoints()] == [epoch]

    def test_what_describes_the_save_is_passed_on(self, api, tmp_path, scale):
        """meta, end_of_epoch and name mean what they mean in `save_checkpoint`."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        checkpointer.save_and_keep_only({"loss": 1.0}, False, "mid")
        (ckpt,) = checkpointer.list_checkpoints()
        assert ckpt.path.name == "CKPT+mid"
        assert (ckpt.meta["loss"], ckpt.meta["end-of-epoch"]) == (1.0, False)

    def test_num_to_keep_and_the_best_beside_the_newest(self, api, tmp_path, scale):
        """keep_recent keeps the newest n, min_keys the best n; ties keep the newer."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        for error in (5, 5, 6):
            checkpointer.save_and_keep_only(meta={"error": error}, min_keys=["error"])
        assert sorted(ckpt.meta["error"] for ckpt in checkpointer.list_checkpoints()) == [5, 6]
        for error in (1, 2, 9, 8):
            checkpointer.save_and_keep_only(
                meta={"error": error}, min_keys=["error"], num_to_keep=2
            )
        assert sorted(ckpt.meta["error"] for ckpt in checkpointer.list_checkpoints()) == [
            1,
            2,
            8,
            9,
        ]

    def test_without_keep_recent_the_saved_one_may_go(self, api, tmp_path, scale):
        """Only the best remains, though it is not the newest."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        for loss in (2.0, 1.0, 3.0):
            checkpointer.save_and_keep_only(
                meta={"loss": loss},
                keep_recent=False,
                min_keys=["loss"],
                importance_keys=[],
            )
        assert [ckpt.meta["loss"] for ckpt in checkpointer.list_checkpoints()] == [1.0]

    def test_importance_keys_and_max_keys_are_kept_too(self, api, tmp_path, scale):
        """They join the newest."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        for acc, size in [(0.9, 1), (0.1, 9), (0.2, 2), (0.3, 3)]:
            checkpointer.save_and_keep_only(
                meta={"acc": acc, "size": size},
                max_keys=["acc"],
                importance_keys=[lambda ckpt: ckpt.meta["size"]],
            )
        assert sorted(ckpt.meta["acc"] for ckpt in checkpointer.list_checkpoints()) == [
            0.1,
            0.3,
            0.9,
        ]

    def test_the_predicate_excludes_from_deletion(self, api, tmp_path, scale):
        """What it is false for stays, and does not count."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        untouched = checkpointer.save_checkpoint(meta={"kind": "fast"})
        for loss in (2.0, 1.0):
            checkpointer.save_and_keep_only(
                meta={"loss": loss, "kind": "full"},
                ckpt_predicate=lambda ckpt: ckpt.meta.get("kind") == "full",
            )
        left = checkpointer.list_checkpoints()
        assert untouched in left
        assert [ckpt.meta["loss"] for ckpt in left if ckpt != untouched] == [1.0]

    def test_num_to_keep_zero_leaves_nothing(self, api, tmp_path, scale):
        """Even the checkpoint just saved is deleted."""
        checkpointer = api.Checkpointer(tmp_path, {"model": scale()})
        checkpointer.save_and_keep_only(num_to_keep=0)
        assert checkpointer.list_checkpoints() == []
