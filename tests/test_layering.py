"""Who may import whom, read from the source, and each check shown to be able to fail."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CORE_NAMES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_sbckpt"

# The Lightning packages under all their names. lightning_utilities is a small library of its own,
# which torchmetrics needs; it is not meant here.
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")

# From the ground up: a module may import those before it, never one after it.
ORDER = (
    "errors",
    "typing",
    "_world.collectives",
    "_world",
    "_world.world",
    "_io",
    "_io.progress",
    "_io.memory",
    "_io.direct_write",
    "_io.exchange",
    "_io.inside",
    "_io.storage",
    "_io.open_regular",
    "_io.records",
    "_io.threads",
    "_io.digests",
    "_format",
    "_format.screening",
    "_format.index",
    "_format.read_tensors",
    "_format.load_in_place",
    "_format.containers",
    "_format.omega",
    "_format.plain",
    "_format.keys",
    "_format.marks",
    "_format.load",
    "_format.encode",
    "_format.image",
    "_format.templates",
    "_format.flat_yaml",
    "_format.python_yaml",
    "_format.yaml",
    "_views",
    "_display",
    "_display.wording",
    "_display.cards",
    "meta",
    "_layout",
    "_layout.annotations",
    "_layout.history",
    "_layout.owner",
    "_layout.lock",
    "_layout.manifest",
    "_layout.publish",
    "_layout.copies",
    "_layout.sizes",
    "_layout.links",
    "_remote",
    "_remote.urls",
    "_remote.retries",
    "_remote.sftp",
    "_remote.stores",
    "_remote.listing",
    "_remote.streams",
    "_remote.files",
    "_remote.folder",
    "_remote.turns",
    "_remote.registry",
    "_remote.mirror",
    "_remote.uploading",
    "_remote.places",
    "hooks.speechbrain",
    "hooks.registry",
    "hooks",
    "hooks.builtin",
    "rng.streams",
    "rng.walk",
    "rng.generators",
    "rng.capture",
    "rng",
    "epoch",
    "expressions.nodes",
    "expressions.grammar",
    "expressions.predicate",
    "expressions",
    "selection",
    "retention.quantities",
    "retention.ranked",
    "retention.spaced",
    "retention.where",
    "retention.budget",
    "retention.text",
    "retention.plan",
    "retention",
    "triggers.moment",
    "triggers.combined",
    "triggers.basic",
    "triggers",
    "_load",
    "_load.module_state",
    "_io.devices",
    "_sharded",
    "_sharded.names",
    "_sharded.fsdp1",
    "_sharded.fsdp1_gradients",
    "_sharded.states",
    "_sharded.contents",
    "_sharded.writing",
    "_sharded.reading",
    "_sharded.loading",
    "_save",
    "_save.request",
    "_save.hashing_copy",
    "_save.arena",
    "_save.sharded_staging",
    "_save.late_copy",
    "_io.background",
    "_save.items",
    "_save.sharded",
    "_save.stage",
    "_save.saver",
    "_catalog",
    "_load.load",
    "_catalog.index",
    "_catalog.watch",
    "_catalog.catalog",
    "retention.noted",
    "_views.timeline",
    "_views.folder_view",
    "_views.drawing",
    "plotting",
    "_views.bars",
    "_views.report_view",
    "folder",
    "report",
    "checkpointer",
    "transfer",
    "averaging.sums",
    "averaging.average",
    "averaging",
    "difference.numbers",
    "difference.states",
    "difference.files",
    "difference.compare",
    "difference",
    "consolidation",
    "export",
    "_views.columns",
    "_views.grid",
    "inspect",
    "verify",
    "plugin._private.trainer",
    "plugin._private.buffers",
    "plugin._private.callbacks",
    "plugin._private.compiled",
    "plugin._private.ddp",
    "plugin._private.finders",
    "plugin._private.logged",
    "plugin._private.loggers",
    "plugin._private.loops",
    "plugin._private.spawn",
    "plugin._private.loading",
    "plugin._private.strategies",
    "plugin._private",
    "plugin.state",
    "plugin.data",
    "plugin.spawned",
    "plugin.state.per_rank",
    "plugin.world",
    "plugin.preemption",
    "plugin.data.epoch_position",
    "plugin.data.objects",
    "plugin.data.workers",
    "plugin.data.sampling",
    "plugin.data.iteration",
    "plugin.data.handle",
    "plugin.data.position",
    "plugin.data.tracker",
    "plugin.state.names",
    "plugin.state.sharded",
    "plugin.state.gradients",
    "plugin.state.hyperparameters",
    "plugin.state.parts",
    "plugin.pieces",
    "plugin.export",
    "plugin.io",
    "plugin.run_folders",
    "plugin.state.adapt",
    "plugin.state.by_name",
    "plugin.state.rates",
    "plugin.state.training_state",
    "plugin.state.hardware",
    "plugin.state.exact",
    "plugin.rendering",
    "plugin.identity",
    "plugin.experiment",
    "plugin.stopping",
    "plugin.resume",
    "plugin.doors",
    "plugin.best",
    "plugin.run",
    "plugin.continuing",
    "plugin.schedule",
    "plugin.options",
    "plugin.state.capture",
    "plugin.metrics",
    "plugin.wanted",
    "plugin.opening",
    "plugin.saving",
    "plugin.callback",
    "plugin.comparison",
    "plugin.selftest",
    # The command line stands on top of everything.
    "cli._bars",
    "cli._common",
    "cli._folders",
    "cli._plan",
    "cli._screen",
    "cli.checking",
    "cli.listing",
    "cli.showing",
    "cli.choosing",
    "cli.keeping",
    "cli._differing",
    "cli.making",
    "cli.consolidating",
    "cli.watching",
    "cli.drawing",
    "cli.completing",
    "cli",
    "cli.__main__",
    "plugin",  # plugin/__init__.py
    "__init__",
)

# Where private names of others may be touched: Lightning's in the files that are named so, and those
# of torch's DataLoader in some more, which don't know Lightning.
LIGHTNING_COMPAT = "plugin._private"
TORCH_COMPAT = (
    "plugin.data.workers",
    "plugin.data.iteration",
    "plugin.data.handle",
    "plugin.data.position",
)

# What is called so is Lightning's, even if a class of ours has a private name that is the same.
LIGHTNING_OBJECTS = {"super", "trainer", "strategy", "loop", "fit_loop", "epoch_loop", "val_loop"}

# Begin with an underscore so as not to clash with fields, and are public all the same.
NAMEDTUPLE_API = ("_asdict", "_fields", "_field_defaults", "_make", "_replace")


def modules() -> Iterator[tuple[str, str]]:
    """Give every module of the package: its name below the package, its source."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        yield ".".join(parts), path.read_text(encoding="utf-8")


def running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk all nodes, functions' insides too, but not what only a type checker sees."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from running_nodes(other)
        else:
            yield from running_nodes(child)


def imported(source: str, module: str = "", *, typing_too: bool = False) -> Iterator[str]:
    """Give the full name of everything that a module imports, at whatever depth."""
    package = ["lightning_sbckpt", *module.split(".")[:-1]]
    tree = ast.parse(source)
    for node in ast.walk(tree) if typing_too else running_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            name = node.args[0]
            if called.endswith(("import_module", "__import__")) and isinstance(name, ast.Constant):
                yield str(name.value)


def lightning_imports(source: str) -> list[str]:
    """Give what a module imports from Lightning, for type checking too."""
    return [name for name in imported(source, typing_too=True) if name.split(".")[0] in LIGHTNING]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in NAMEDTUPLE_API


def own_private_names(tree: ast.AST) -> set[str]:
    """Give the private names that a module's own classes define, and so may touch on each other."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    found.add(item.name)
                elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    found.add(item.target.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            found.add(node.attr)
    return found


def private_touches(source: str) -> list[str]:
    """Give every touch of a private name of something else, and private Lightning imports."""
    found = [
        name
        for name in imported(source, typing_too=True)
        if name.split(".")[0] in LIGHTNING and any(map(is_private, name.split(".")))
    ]
    tree = ast.parse(source)
    own_names = own_private_names(tree)
    for node in ast.walk(tree):
        owner, name = None, ""
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"getattr", "setattr", "hasattr", "delattr"}
            and isinstance(node.args[1], ast.Constant)
        ):
            owner, name = node.args[0], str(node.args[1].value)
        last = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "super")
        own = isinstance(owner, ast.Name) and owner.id in {"self", "cls"}
        own = own or (name in own_names and last not in LIGHTNING_OBJECTS)
        # `import lightning_sbckpt._layout.publish` is a module of ours, not an attribute of something.
        ours = owner is not None and ast.unparse(owner).split(".")[0] == "lightning_sbckpt"
        if owner is not None and is_private(name) and not own and not ours:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def upward_imports(module: str, source: str) -> list[str]:
    """Give the imports of a module that do not point to the ground."""
    place = ORDER.index(module)
    found = []
    for name in imported(source, module):
        if name.split(".")[0] != "lightning_sbckpt":
            continue
        parts = name.split(".")[1:]
        # `from lightning_sbckpt.meta import Checkpoint` names a thing in a module: the module is
        # the longest beginning that is one.
        while parts and ".".join(parts) not in ORDER:
            parts.pop()
        target = ".".join(parts) or "__init__"
        if target != module and ORDER.index(target) > place:
            found.append(f"{module} imports {name}")
    return found


def test_nothing_outside_the_plugin_imports_lightning():
    """No module of the core names Lightning in an import, at the top, nested or for types."""
    offences = {
        module: names
        for module, source in modules()
        if module.split(".")[0] != "plugin" and (names := lightning_imports(source))
    }
    assert offences == {}


@pytest.mark.parametrize(
    "offence",
    [
        "import lightning",
        "import lightning.pytorch as pl",
        "from pytorch_lightning import Trainer",
        "def f():\n    from lightning.pytorch import Trainer",
        "if TYPE_CHECKING:\n    from lightning_fabric import Fabric",
        "import importlib\nimportlib.import_module('lightning.pytorch')",
    ],
)
def test_an_import_of_lightning_is_found_wherever_it_hides(offence):
    """The check above can fail: every way of importing Lightning is an offence."""
    assert lightning_imports(offence)


def test_what_only_sounds_like_lightning_is_no_offence():
    """This package's own name and the helper library of torchmetrics may be imported."""
    assert not lightning_imports("import lightning_sbckpt\nimport lightning_utilities")


TOUCH_EVERY_CORE_NAME = f"""
import sys
import lightning_sbckpt
for name in {CORE_NAMES!r}:
    getattr(lightning_sbckpt, name)
loaded = [name for name in {LIGHTNING!r} if name in sys.modules]
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""


def run_with_path(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(path)},
        cwd=path,
        capture_output=True,
        text=True,
        check=False,
    )


def test_using_every_core_name_leaves_lightning_unloaded():
    """A new process that has touched all of the core has not loaded Lightning."""
    done = run_with_path(TOUCH_EVERY_CORE_NAME, ROOT)
    assert done.returncode == 0, done.stderr


def test_a_core_that_loads_lightning_is_caught(tmp_path):
    """The check above can fail: a stand-in package that imports Lightning does not pass it."""
    (tmp_path / "lightning.py").touch()
    (tmp_path / "lightning_sbckpt.py").write_text(
        "def __getattr__(name):\n    import lightning\n    return None\n"
    )
    done = run_with_path(TOUCH_EVERY_CORE_NAME, tmp_path)
    assert done.returncode == 1
    assert "loaded: ['lightning']" in done.stderr


def test_private_names_of_others_are_touched_in_files_for_them_only():
    """In the plugin, `something._name` and private Lightning imports stand in plugin/_private/ alone."""
    offences = {
        module: touches
        for module, source in modules()
        if module.split(".")[0] == "plugin"
        and not module.startswith(LIGHTNING_COMPAT)
        and module not in TORCH_COMPAT
        and (touches := private_touches(source))
    }
    assert offences == {}


@pytest.mark.parametrize("home", TORCH_COMPAT)
def test_a_file_for_private_names_of_torch_does_not_know_lightning(home):
    """So what it touches can't be Lightning's."""
    (source,) = (source for name, source in modules() if name == home)
    assert not lightning_imports(source)
    assert not [name for name in imported(source) if "._private" in name]


@pytest.mark.parametrize(
    "offence",
    [
        "trainer._checkpoint_connector.resume_start",
        "def f(self):\n    self.trainer._run_stage()",
        "class A:\n    def _run(self): self.trainer._run()",
        "super()._restore()",
        "getattr(trainer, '_loggers')",
        "setattr(strategy, '_checkpoint_io', io)",
        "from lightning.pytorch.loops.fetchers import _DataFetcher",
        "from lightning.pytorch.utilities._pytree import tree",
    ],
)
def test_a_touch_of_a_private_name_is_found(offence):
    """The check above can fail: reading, calling, setting and importing are all offences."""
    assert private_touches(offence)


def test_ones_own_private_names_are_no_offence():
    """What a file's own classes define, dunder names and named tuples' methods may be used."""
    assert not private_touches(
        "class A:\n"
        "    def __init__(self): self._notes = []\n"
        "class B:\n"
        "    def f(self, a): return a._notes\n"
    )
    assert not private_touches(
        "def f(self, ckpt):\n"
        "    self._x = ckpt.__class__\n"
        "    return ckpt._replace(path=None)\n"
        "import lightning_sbckpt._layout.publish\n"
        "lightning_sbckpt._layout.publish.publish()\n"
    )


def test_every_module_has_its_place_in_the_order():
    """A new module is placed in the order before anything can be said about its imports."""
    unplaced = {module for module, _ in modules()} - set(ORDER)
    assert unplaced == set()


def test_imports_point_to_the_ground():
    """No module imports one that stands above it, at the top of the file or nested."""
    offences = [
        offence
        for module, source in modules()
        if module in ORDER
        for offence in upward_imports(module, source)
    ]
    assert offences == []


@pytest.mark.parametrize(
    ("module", "offence"),
    [
        ("errors", "from lightning_sbckpt.meta import Checkpoint"),
        ("meta", "def f():\n    from lightning_sbckpt import _layout"),
        ("meta", "import lightning_sbckpt._layout.publish"),
        ("checkpointer", "from lightning_sbckpt.plugin.callback import SBCheckpoint"),
        ("checkpointer", "from lightning_sbckpt import Checkpoint"),
        ("plugin.io", "from .callback import SBCheckpoint"),
        ("plugin.io", "from ..plugin import callback"),
    ],
)
def test_an_import_that_points_up_is_found(module, offence):
    """The check above can fail: absolute, relative and nested imports, and the package itself."""
    assert upward_imports(module, offence)


def test_an_import_for_type_checkers_may_point_up():
    """What never runs makes no cycle."""
    source = "if TYPE_CHECKING:\n    from lightning_sbckpt.meta import Checkpoint"
    assert not upward_imports("errors", source)
