"""Hooks: which one serves an object, what is refused, and registries of one's own."""

from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt.errors import HookError, HookSignatureError
from lightning_sbckpt.hooks import (
    DEFAULT_LOAD_HOOKS,
    DEFAULT_SAVE_HOOKS,
    DEFAULT_TRANSFER_HOOKS,
    HookRegistry,
    default_registry,
    mark_as_loader,
    mark_as_saver,
    mark_as_transfer,
    register_checkpoint_hooks,
)


class Base:
    """An object with a number and, as any stateful object, a state."""

    def __init__(self, number=0):
        self.number = number

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


class Derived(Base):
    """An object of a subclass."""


class Bare:
    """An object that nothing knows how to save."""


def save_as(text):
    """Return a save hook that writes this text."""
    return lambda obj, path: Path(path).write_text(text)


@pytest.fixture
def registry():
    """A copy of the default registry."""
    return default_registry.copy()


def saved_text(tmp_path, registry, obj, **hooks):
    """Return what a checkpointer writes for the object, as text or as a state."""
    ckpt = Checkpointer(tmp_path, {"obj": obj}, registry=registry, **hooks).save_checkpoint()
    data = ckpt.paramfiles["obj"].read_bytes()
    return torch.load(ckpt.paramfiles["obj"]) if data[:2] == b"PK" else data.decode()


class TestLookup:
    """By name, then by class along the MRO, then by `state_dict`."""

    def test_each_step_wins_over_the_next(self, tmp_path, registry):
        """Taking away the winner each time shows the next in line."""
        obj = Derived(3)
        registry.save[Base] = save_as("base")
        registry.save[Derived] = save_as("derived")
        named = {"custom_save_hooks": {"obj": save_as("name")}}
        assert saved_text(tmp_path, registry, obj, **named) == "name"
        assert saved_text(tmp_path, registry, obj) == "derived"
        del registry.save[Derived]
        assert saved_text(tmp_path, registry, obj) == "base"
        del registry.save[Base]
        assert saved_text(tmp_path, registry, obj) == {"number": 3}

    def test_loading_looks_in_the_same_order(self, tmp_path, registry):
        """The same three steps, with `end_of_epoch` handed on."""
        called = []

        def load_as(word):
            return lambda obj, path, end_of_epoch: called.append((word, end_of_epoch))

        Checkpointer(tmp_path, {"obj": Derived(3)}).save_checkpoint(end_of_epoch=False)
        obj = Derived()
        registry.load[Base] = load_as("base")
        registry.load[Derived] = load_as("derived")
        for hooks in ({"custom_load_hooks": {"obj": load_as("name")}}, {}):
            Checkpointer(tmp_path, {"obj": obj}, registry=registry, **hooks).recover_if_possible()
        del registry.load[Derived]
        Checkpointer(tmp_path, {"obj": obj}, registry=registry).recover_if_possible()
        assert called == [("name", False), ("derived", False), ("base", False)]
        assert obj.number == 0
        del registry.load[Base]
        Checkpointer(tmp_path, {"obj": obj}, registry=registry).recover_if_possible()
        assert obj.number == 3

    def test_with_two_bases_the_mro_decides(self, registry):
        """The first base that has a hook wins, however late it was registered."""

        class Left: ...

        class Right: ...

        class Both(Left, Right): ...

        right, left = save_as("right"), save_as("left")
        registry.save[Right] = right
        assert registry.saver(Both()) is right
        registry.save[Left] = left
        assert registry.saver(Both()) is left

    def test_without_any_way_every_object_is_named(self, tmp_path):
        """All of them at once, by name and type, and nothing is written."""
        checkpointer = Checkpointer(tmp_path, {"a": Bare(), "fine": Base(), "b": Bare()})
        with pytest.raises(HookError, match=r"how to save 'a' \(Bare\), 'b' \(Bare\).*register"):
            checkpointer.save_checkpoint()
        assert list(tmp_path.iterdir()) == []

    def test_an_object_with_half_a_state_is_not_taken_for_stateful(self, tmp_path):
        """`state_dict` alone would save what could never be loaded."""

        class Half:
            def state_dict(self):
                return {"a": 1}

        with pytest.raises(HookError, match=r"'half' \(.*Half\)"):
            Checkpointer(tmp_path, {"half": Half()}).save_checkpoint()


class TestRegistry:
    """Registries can be copied and scoped."""

    def test_a_copy_is_independent_in_both_directions(self):
        """Hooks of every kind, and what is saved on every rank."""
        original = HookRegistry()
        original.save[int] = save_as("int")
        original.save_on_every_rank.add(int)
        other = original.copy()
        assert other.saver(1) is original.save[int]
        assert other.saves_on_every_rank(1)
        other.save[int] = save_as("other")
        other.load[int] = lambda obj, path, end_of_epoch: None
        other.transfer[int] = save_as("other")
        other.save_on_every_rank.clear()
        original.load[str] = lambda obj, path, end_of_epoch: None
        assert other.saver(1) is not original.saver(1)
        assert original.loader(1) is None and original.transferrer(1) is None
        assert other.loader("") is None
        assert original.saves_on_every_rank(1) and not other.saves_on_every_rank(1)

    def test_the_well_known_dictionaries_are_those_of_the_default_registry(self):
        """What a user of SpeechBrain assigns to is what is used."""
        assert DEFAULT_SAVE_HOOKS is default_registry.save
        assert DEFAULT_LOAD_HOOKS is default_registry.load
        assert DEFAULT_TRANSFER_HOOKS is default_registry.transfer

    def test_a_class_registered_by_name_gets_its_hooks_when_it_is_met(self):
        """Also through a subclass; in each copy on its own; once."""
        calls = []

        def register(registry, cls):
            calls.append(cls)
            registry.save[cls] = save_as("lazy")

        original = HookRegistry()
        original.register_lazily("collections.Counter", register)
        other = original.copy()

        class Tally(collections.Counter): ...

        assert original.saver({}) is None
        assert calls == []
        assert original.saver(Tally()) is original.save[collections.Counter]
        assert original.saver(collections.Counter()) is not None
        assert calls == [collections.Counter]
        assert collections.Counter not in other.save
        assert other.saver(collections.Counter()) is not None
        assert calls == [collections.Counter] * 2

    @pytest.mark.long
    def test_torchmetrics_is_not_imported_for_its_hooks(self):
        """Neither by the package nor by saving and loading; met later, it still gets its hooks."""
        script = """
import sys, tempfile, torch
from lightning_sbckpt import Checkpointer
from lightning_sbckpt.hooks import default_registry
folder = tempfile.mkdtemp()
checkpointer = Checkpointer(folder, {"model": torch.nn.Linear(1, 1)})
checkpointer.save_checkpoint()
checkpointer.recover_if_possible()
print("torchmetrics" in sys.modules, "lightning" in sys.modules)
import torchmetrics
print(default_registry.saver(torchmetrics.SumMetric()).__name__)
"""
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert done.stdout.split() == ["False", "False", "save_metric"], done.stderr


def no_path(obj): ...


def one_more(obj, path, more): ...


def keyword_only(obj, *, path): ...


def load_without_epoch(obj, path): ...


def load_keyword_epoch(obj, path, *, end_of_epoch): ...


UNUSABLE = [
    *(("save", hook) for hook in (no_path, one_more, keyword_only)),
    *(("load", hook) for hook in (no_path, load_without_epoch, load_keyword_epoch)),
    *(("transfer", hook) for hook in (no_path, one_more, keyword_only)),
]


class TestSignatures:
    """What can't be called is refused where it is registered, not when it is needed."""

    @pytest.mark.parametrize(("kind", "hook"), UNUSABLE)
    def test_assignment_to_a_dictionary_is_checked(self, registry, kind, hook):
        """The message names the hook, the class, what was found and what is expected."""
        with pytest.raises(HookSignatureError) as caught:
            getattr(registry, kind)[Base] = hook
        message = str(caught.value)
        expected = "(obj, path, end_of_epoch)" if kind == "load" else "(obj, path)"
        assert f"the {kind} hook {hook.__name__} for Base" in message
        assert f"expected one that can be called as {expected}" in message
        assert Base not in getattr(registry, kind)
        assert isinstance(caught.value, TypeError)

    @pytest.mark.parametrize(("kind", "hook"), UNUSABLE)
    def test_the_decorators_check(self, kind, hook):
        """At the definition of the class, which is where the mistake is."""
        mark = {"save": mark_as_saver, "load": mark_as_loader, "transfer": mark_as_transfer}[kind]
        with pytest.raises(HookSignatureError, match=hook.__name__):
            mark(hook)

    @pytest.mark.parametrize("kind", ["save", "load"])
    def test_custom_hooks_of_a_checkpointer_are_checked(self, tmp_path, kind):
        """At construction and at `add_recoverable`; nothing is made or added."""
        hook = no_path
        with pytest.raises(HookSignatureError, match=rf"the {kind} hook no_path for 'model'"):
            Checkpointer(tmp_path / "run", **{f"custom_{kind}_hooks": {"model": hook}})
        assert not (tmp_path / "run").exists()
        checkpointer = Checkpointer(tmp_path)
        with pytest.raises(HookSignatureError, match="for 'model'"):
            checkpointer.add_recoverable("model", Base(), **{f"custom_{kind}_hook": hook})
        assert checkpointer.recoverables == {}

    def test_what_is_no_callable_is_refused(self, registry):
        """A string, say."""
        with pytest.raises(HookSignatureError, match="is a str, expected a callable"):
            registry.save[Base] = "save"

    def test_names_defaults_and_stars_are_free(self, registry):
        """Only being callable with positional arguments counts."""
        registry.save[Base] = lambda thing, where, compress=True: None
        registry.save[Base] = lambda *args: None
        registry.load[Base] = lambda a, b, c=False, **rest: None
        registry.save[Base] = print  # A builtin.


class TestDecorator:
    """`register_checkpoint_hooks` with and without arguments."""

    @pytest.fixture(autouse=True)
    def _default_hooks_stay_as_they_are(self):
        tables = (DEFAULT_SAVE_HOOKS, DEFAULT_LOAD_HOOKS, DEFAULT_TRANSFER_HOOKS)
        before = [dict(table) for table in tables]
        every_rank = set(default_registry.save_on_every_rank)
        yield
        for table, hooks in zip(tables, before, strict=True):
            table.clear()
            table.update(hooks)
        default_registry.save_on_every_rank.clear()
        default_registry.save_on_every_rank.update(every_rank)

    @pytest.mark.parametrize(
        ("decorate", "every_rank"),
        [
            (register_checkpoint_hooks, False),
            (register_checkpoint_hooks(), False),
            (register_checkpoint_hooks(save_on_main_only=True), False),
            (register_checkpoint_hooks(save_on_main_only=False), True),
            (lambda cls: register_checkpoint_hooks(cls, save_on_main_only=False), True),
        ],
    )
    def test_every_form_registers_and_returns_the_class(self, decorate, every_rank):
        """All three kinds; whether rank zero saves alone is as said."""

        class Marked:
            @mark_as_saver
            def save(self, path): ...

            @mark_as_loader
            def load(self, path, end_of_epoch): ...

            @mark_as_transfer
            def transfer(self, path): ...

        assert decorate(Marked) is Marked
        assert default_registry.saver(Marked()) is Marked.save
        assert default_registry.loader(Marked()) is Marked.load
        assert default_registry.transferrer(Marked()) is Marked.transfer
        assert default_registry.saves_on_every_rank(Marked()) is every_rank

    def test_one_method_may_be_two_hooks(self):
        """Saver and transfer take the same arguments."""

        @register_checkpoint_hooks
        class Marked:
            @mark_as_saver
            @mark_as_transfer
            def both(self, path): ...

        assert default_registry.saver(Marked()) is Marked.both
        assert default_registry.transferrer(Marked()) is Marked.both

    def test_a_subclass_inherits_hooks_and_the_ranks_they_run_on(self):
        """Until it has a saver of its own, which says anew where it runs."""

        @register_checkpoint_hooks(save_on_main_only=False)
        class Parent:
            @mark_as_saver
            def save(self, path): ...

        class Child(Parent): ...

        assert default_registry.saver(Child()) is Parent.save
        assert default_registry.saves_on_every_rank(Child())

        @register_checkpoint_hooks
        class Other(Parent):
            @mark_as_saver
            def save(self, path): ...

        assert default_registry.saver(Other()) is Other.save
        assert not default_registry.saves_on_every_rank(Other())
        assert default_registry.saves_on_every_rank(Parent())

    def test_a_hook_given_by_name_runs_on_rank_zero_whatever_the_class_says(self, tmp_path):
        """It replaces the saver of the class, and with it what that one needs."""

        @register_checkpoint_hooks(save_on_main_only=False)
        class Gathers:
            @mark_as_saver
            def save(self, path): ...

        checkpointer = Checkpointer(tmp_path, {"by_class": Gathers(), "by_name": Gathers()})
        checkpointer.custom_save_hooks["by_name"] = save_as("text")
        items = checkpointer._save_items(checkpointer.recoverables)
        assert [items[name].on_every_rank for name in ("by_class", "by_name")] == [True, False]
