"""What SpeechBrain documents about hooks: marks, registration, lookup, torch's objects, ranks.

Sources: the docstrings and unit tests of `speechbrain.utils.checkpoints`.

`pytest --original` with this file runs every test against the real SpeechBrain.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from _numbered import Plain, make_counter_class, read_number, write_number
from _python import python


class TestHookRegistration:
    """Marks, signature checks, registration of classes, lookup."""

    def test_a_marked_method_stays_the_method(self, api):
        """Marking returns the function itself."""

        def saver(self, path):
            """Save."""

        def loader(self, path, end_of_epoch):
            """Load."""

        def transfer(self, path):
            """Transfer."""

        assert api.mark_as_saver(saver) is saver
        assert api.mark_as_loader(loader) is loader
        assert api.mark_as_transfer(transfer) is transfer

    @pytest.mark.parametrize(
        ("mark", "method"),
        [
            ("mark_as_saver", lambda self: None),
            ("mark_as_saver", lambda self, path, extra: None),
            ("mark_as_loader", lambda self, path: None),
            ("mark_as_loader", lambda self, path, end_of_epoch, extra: None),
            ("mark_as_transfer", lambda self: None),
            ("mark_as_transfer", lambda self, path, extra: None),
            ("mark_as_loader", lambda self, path, *, end_of_epoch: None),
        ],
    )
    def test_a_method_of_the_wrong_signature_is_refused(self, api, mark, method):
        """The TypeError says what the signature must be."""
        with pytest.raises(TypeError, match="path"):
            getattr(api, mark)(method)

    def test_further_parameters_with_defaults_are_fine(self, api):
        """Only what is called for must be possible."""
        api.mark_as_saver(lambda self, path, mode="w": None)
        api.mark_as_loader(lambda self, path, end_of_epoch=True, device=None: None)
        api.mark_as_transfer(lambda self, *args: None)

    def test_a_registered_class_saves_and_loads_by_its_methods(self, api, tmp_path):
        """Decorator in, same class out; its instances are recoverables."""
        cls = make_counter_class(api)
        counter = cls(1)
        assert isinstance(counter, cls)
        checkpointer = api.Checkpointer(tmp_path, {"counter": counter})
        ckpt = checkpointer.save_checkpoint()
        assert ckpt.paramfiles["counter"].read_text() == "1"
        counter.number = 2
        assert checkpointer.recover_if_possible() == ckpt
        assert counter.number == 1

    def test_the_decorator_works_bare(self, api):
        """`@register_checkpoint_hooks` over a class, without parentheses."""

        @api.register_checkpoint_hooks
        class Bare:
            @api.mark_as_saver
            def save(self, path):
                """Save."""

        assert isinstance(Bare(), Bare)
        assert api.get_default_hook(Bare(), api.DEFAULT_SAVE_HOOKS) is not None
        assert api.get_default_hook(Bare(), api.DEFAULT_LOAD_HOOKS) is None

    def test_marks_alone_register_nothing(self, api, tmp_path):
        """The class must be decorated as well."""

        class Unregistered:
            @api.mark_as_saver
            def save(self, path):
                """Save."""

        assert api.get_default_hook(Unregistered(), api.DEFAULT_SAVE_HOOKS) is None
        with pytest.raises(RuntimeError, match="Unregistered"):
            api.Checkpointer(tmp_path, {"x": Unregistered()}).save_checkpoint()

    def test_subclasses_inherit_and_may_replace_hooks(self, api, tmp_path):
        """Lookup goes along the method resolution order, nearest first."""
        parent = make_counter_class(api)

        class Child(parent):
            pass

        @api.register_checkpoint_hooks
        class Stubborn(parent):
            @api.mark_as_saver
            def save_tenfold(self, path):
                Path(path).write_text(str(self.number * 10))

        child, stubborn = Child(2), Stubborn(2)
        checkpointer = api.Checkpointer(tmp_path, {"child": child, "stubborn": stubborn})
        checkpointer.save_checkpoint()
        checkpointer.recover_if_possible()
        assert (child.number, stubborn.number) == (2, 20)

    def test_get_default_hook_follows_the_mro(self, api):
        """The nearest class that is in the dictionary; None when no class is."""

        class A:
            pass

        class B(A):
            pass

        class C(B):
            pass

        def of_a(obj, path):
            """Hook of A."""

        def of_b(obj, path):
            """Hook of B."""

        assert api.get_default_hook(C(), {A: of_a, B: of_b}) is of_b
        assert api.get_default_hook(A(), {A: of_a, B: of_b}) is of_a
        assert api.get_default_hook(C(), {A: of_a}) is of_a
        assert api.get_default_hook(object(), {A: of_a}) is None

    def test_torch_objects_have_documented_default_hooks(self, api):
        """Modules save with `torch_save`, load with `torch_recovery`, transfer by name."""
        linear = torch.nn.Linear(1, 1)
        adam = torch.optim.Adam(linear.parameters())
        assert api.get_default_hook(linear, api.DEFAULT_SAVE_HOOKS) is api.torch_save
        assert api.get_default_hook(linear, api.DEFAULT_LOAD_HOOKS) is api.torch_recovery
        assert (
            api.get_default_hook(linear, api.DEFAULT_TRANSFER_HOOKS) is api.torch_parameter_transfer
        )
        assert api.get_default_hook(adam, api.DEFAULT_SAVE_HOOKS) is api.torch_save
        assert api.get_default_hook(adam, api.DEFAULT_LOAD_HOOKS) is api.torch_recovery
        assert api.torch_save.__doc__.strip()

    def test_the_default_dictionaries_can_be_assigned_to(self, api, tmp_path):
        """`DEFAULT_SAVE_HOOKS[cls] = hook` registers a hook for a class of someone else."""

        class Foreign(Plain):
            pass

        api.DEFAULT_SAVE_HOOKS[Foreign] = write_number
        api.DEFAULT_LOAD_HOOKS[Foreign] = read_number
        try:
            foreign = Foreign(8)
            checkpointer = api.Checkpointer(tmp_path, {"foreign": foreign})
            checkpointer.save_checkpoint()
            foreign.number = 0
            checkpointer.recover_if_possible()
            assert foreign.number == 8
        finally:
            del api.DEFAULT_SAVE_HOOKS[Foreign]
            del api.DEFAULT_LOAD_HOOKS[Foreign]
        assert api.get_default_hook(Foreign(), api.DEFAULT_SAVE_HOOKS) is None


class TestTorchDefaults:
    """Torch's objects are saved and loaded without any hook of the user."""

    def test_modules_optimizers_and_schedulers_continue_where_they_were(self, api, tmp_path):
        """After recovery the next steps are the same, bit for bit."""

        def build():
            torch.manual_seed(1)
            model = torch.nn.Linear(3, 2)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            cyclic_optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            cyclic = torch.optim.lr_scheduler.CyclicLR(
                cyclic_optimizer, 0.01, 0.1, step_size_up=3, cycle_momentum=False
            )
            step_optimizer = torch.optim.Adam(model.parameters())
            step = torch.optim.lr_scheduler.StepLR(step_optimizer, 2, 0.5)
            return {
                "model": model,
                "optimizer": optimizer,
                "plateau": plateau,
                "cyclic_optimizer": cyclic_optimizer,
                "cyclic": cyclic,
                "step_optimizer": step_optimizer,
                "step": step,
            }

        def train(objs, steps):
            inputs = torch.arange(6.0).reshape(2, 3) / 6
            for _ in range(steps):
                for name in ("optimizer", "cyclic_optimizer"):
                    objs["model"].zero_grad()
                    objs["model"](inputs).pow(2).sum().backward()
                    objs[name].step()
                objs["plateau"].step(1.0)
                objs["cyclic"].step()
                objs["step_optimizer"].step()
                objs["step"].step()

        whole = build()
        train(whole, 6)
        first = build()
        train(first, 3)
        api.Checkpointer(tmp_path, first).save_checkpoint()
        second = build()
        api.Checkpointer(tmp_path, second).recover_if_possible()
        train(second, 3)
        assert torch.equal(second["model"].weight, whole["model"].weight)
        assert second["plateau"].state_dict() == whole["plateau"].state_dict()
        assert second["cyclic"].get_last_lr() == whole["cyclic"].get_last_lr()
        assert second["step"].get_last_lr() == whole["step"].get_last_lr()

    def test_a_grad_scaler_keeps_its_scale(self, api, tmp_path):
        """`torch.amp.GradScaler` has default hooks, too."""
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        checkpointer = api.Checkpointer(tmp_path, {"scaler": scaler})
        checkpointer.save_checkpoint()
        other = torch.amp.GradScaler("cpu", init_scale=2.0)
        api.Checkpointer(tmp_path, {"scaler": other}).recover_if_possible()
        assert other.state_dict() == scaler.state_dict()

    def test_the_torch_functions_can_be_called_directly(self, api, tmp_path, scale):
        """`torch_save(obj, path)` writes what `torch_recovery(obj, path, end_of_epoch)` reads."""
        path = tmp_path / "model.ckpt"
        api.torch_save(scale(5), path)
        assert torch.load(path, weights_only=True)["param"].item() == 5
        other = scale(0)
        api.torch_recovery(other, path, True)
        assert other.value == 5


TWO_RANKS = """
import os, sys
import torch
import torch.distributed as dist

rank, which, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
if which == "original":
    import importlib.machinery, types
    standin = types.ModuleType("torchaudio")
    standin.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = standin
    import speechbrain.utils.checkpoints as api
else:
    import lightning_sbckpt as api

dist.init_process_group(
    "gloo", rank=rank, world_size=2, init_method=f"file://{folder}/sync"
)

class Base:
    number = 0

    @api.mark_as_loader
    def load(self, path, end_of_epoch):
        with open(path) as file:
            self.number = int(file.read())

class OnMain(Base):
    @api.mark_as_saver
    def save(self, path):
        with open(path, "w") as file:
            file.write(str(self.number))
        with open(f"{folder}/on_main-{rank}", "w"):
            pass

class Everywhere(Base):
    @api.mark_as_saver
    def save(self, path):
        # A saver like this gathers first, so every rank must take part in the call.
        total = torch.tensor([self.number])
        dist.all_reduce(total)
        with open(f"{folder}/everywhere-{rank}", "w"):
            pass
        if rank == 0:
            with open(path, "w") as file:
                file.write(str(total.item()))

api.register_checkpoint_hooks(Base)
api.register_checkpoint_hooks(OnMain)
api.register_checkpoint_hooks(Everywhere, save_on_main_only=False)

main, everywhere = OnMain(), Everywhere()
main.number = everywhere.number = 1 + rank
model = torch.nn.Linear(2, 2)
checkpointer = api.Checkpointer(
    f"{folder}/run", {"model": model, "main": main, "everywhere": everywhere}
)
ckpt = checkpointer.save_checkpoint()
assert (ckpt is None) == (rank != 0), ckpt
dist.barrier()
main.number = everywhere.number = 0
loaded = checkpointer.recover_if_possible()
assert len(checkpointer.list_checkpoints()) == 1
assert (main.number, everywhere.number) == (1, 3), (main.number, everywhere.number)
gathered = [torch.empty_like(model.weight) for _ in range(2)]
dist.all_gather(gathered, model.weight.data)
assert torch.equal(gathered[0], gathered[1])
checkpointer.save_and_keep_only()
dist.barrier()
assert [c.path for c in checkpointer.list_checkpoints()] != [loaded.path]
assert len(checkpointer.list_checkpoints()) == 1
dist.destroy_process_group()
print("done", rank)
"""


class TestSeveralProcesses:
    """One checkpoint for all the processes of a job."""

    def test_savers_run_on_the_main_process_unless_registered_otherwise(self, request, tmp_path):
        """Two real processes: rank 1 gets None back, and runs only `save_on_main_only=False`."""
        which = "original" if request.config.getoption("--original") else "ours"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

        def run(rank):
            arguments = ("-c", TWO_RANKS, str(rank), which, tmp_path)
            return python(*arguments, env=environment, together=True).stdout

        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(run, range(2)))
        for rank, output in enumerate(outputs):
            assert f"done {rank}" in output, output
        names = set(os.listdir(tmp_path))
        assert "on_main-0" in names and "on_main-1" not in names
        assert {"everywhere-0", "everywhere-1"} <= names
