"""Lightning's two packages and this one imported in every order, each in a process of its own.

`python _import_orders.py FOLDER ORDER...`: a process for each order is forked when torch is loaded and
no Lightning is, and writes what went wrong, if anything, to a file of the order's number. An order is
names of packages with a `+` between them; `made` stands for making a callback and deriving a class,
and `no:` before a name for a package that is not installed.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

LIGHTNING = ("lightning", "lightning.pytorch", "pytorch_lightning")


def run(order: str, folder: Path) -> None:
    """Import, and then fit, resume, test and load with each package that was imported."""
    import torch

    callbacks, kinds = [], []
    for name in order.split("+"):
        if name == "made":
            import lightning_sbckpt

            kinds.append(type("Derived", (lightning_sbckpt.SBCheckpoint,), {}))
            callbacks.append(kinds[0](folder / "made"))
        elif name.startswith("no:"):
            sys.modules[name[3:]] = None
        else:
            import_module(name)
    from lightning_sbckpt import SBCheckpoint

    wanted = {name.partition(".")[0] for name in order.split("+") if name in LIGHTNING}
    present = {name.partition(".")[0] for name in LIGHTNING if sys.modules.get(name)}
    assert present == wanted, f"{wanted} was imported, and {present} is there"
    data = torch.utils.data.DataLoader(torch.ones(8, 2))
    for name in sorted(wanted):
        package = import_module("lightning.pytorch" if name == "lightning" else name)

        class Model(package.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(2, 1)

            def training_step(self, batch, batch_idx):
                return self.layer(batch).sum()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        def trainer(*callbacks, epochs=1, package=package, **options):
            quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
            return package.Trainer(
                accelerator="cpu", max_epochs=epochs, callbacks=[*callbacks], **quiet, **options
            )

        run = folder / name
        for epochs, callback in enumerate([*callbacks[:1], *map(SBCheckpoint, 2 * [run])], start=1):
            if not isinstance(callback, package.callbacks.Checkpoint):
                raise TypeError(f"{callback} is no Checkpoint of {package.__name__}")
            assert issubclass(SBCheckpoint, package.Callback)
            fit = trainer(callback, epochs=epochs)
            assert fit.checkpoint_callbacks == [callback]
            torch.manual_seed(0)
            module = Model()
            fit.fit(module, data)
        callbacks.clear()
        assert callback.resume_report is not None
        Model.test_step = lambda self, batch, batch_idx: None
        alone = trainer(enable_checkpointing=False)
        alone.test(other := Model(), data, ckpt_path=run, verbose=False)
        loaded = Model.load_from_checkpoint(run)
        for found in (other, loaded):
            assert torch.equal(found.layer.weight, module.layer.weight)


def main(folder: str, *orders: str) -> None:
    """Fork a process for each order, one after the other."""
    import torch  # noqa: F401
    import torchmetrics  # noqa: F401

    assert not [name for name in LIGHTNING if name in sys.modules]
    for number, order in enumerate(orders):
        child = os.fork()
        if child == 0:
            try:
                run(order, Path(folder) / f"run-{number}")
                wrong = ""
            except BaseException:
                wrong = traceback.format_exc()
            (Path(folder) / str(number)).write_text(wrong)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
