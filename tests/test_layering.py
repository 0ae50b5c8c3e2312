"""Who may import whom, read from the source, and each check shown to be able to fail."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import CORE_NAMES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_sbckpt"

# The Lightning packages under all their names. lightning_utilities is a small library of its own,
# which torchmetrics needs; it is not meant here.
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")

# From the ground up: what is in a folder, or is a file beside the folders, may import what stands in
# a line above its own, and what is in its own folder. No two of one line import each other.
LAYERS = """
    errors typing _io
    _format _display _world rng
    meta hooks
    _layout expressions epoch
    _remote _sharded selection
    _save _load _catalog retention triggers
    _views
    plotting inspect verify
    folder
    run_paths
    checkpointer report
    averaging consolidation difference export transfer plugin.packages
    plugin._private
    plugin.data
    plugin.state
    plugin
    cli __init__
"""
FLOORS = {name: floor for floor, line in enumerate(LAYERS.split("\n")) for name in line.split()}

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


def lightning_imports(source: str, *, typing_too: bool = True) -> list[str]:
    """Give what a module imports from Lightning, for type checking too unless told otherwise."""
    names = imported(source, typing_too=typing_too)
    return [name for name in names if name.split(".")[0] in LIGHTNING]


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


def targets(module: str, source: str) -> Iterator[str]:
    """Give the modules of the package that a module imports."""
    for name in imported(source, module):
        if name.split(".")[0] != "lightning_sbckpt":
            continue
        parts = name.split(".")[1:]
        # `from lightning_sbckpt.meta import Checkpoint` names a thing in a module: the module is
        # the longest beginning that is one.
        while parts and not is_module(".".join(parts)):
            parts.pop()
        target = ".".join(parts) or "__init__"
        if target != module:
            yield target


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def folder_of(module: str) -> str:
    """Return the longest beginning of a module's name that has a floor; the first part, if none has."""
    parts = module.split(".")
    return next((n for n in (".".join(parts[:2]), parts[0]) if n in FLOORS), parts[0])


def upward_imports(module: str, source: str) -> list[str]:
    """Give the imports of a module that lead to another folder which is not below its own."""
    home = folder_of(module)
    return [
        f"{module} imports {target}"
        for target in targets(module, source)
        if folder_of(target) != home and FLOORS[folder_of(target)] >= FLOORS[home]
    ]


def circle(sources: Mapping[str, str]) -> list[str]:
    """Return modules of which each imports the next, and the last is the first; none if there are none."""
    graph = {module: {*targets(module, source)} for module, source in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_nothing_outside_the_plugin_imports_lightning():
    """No module of the core names Lightning in an import, at the top, nested or for types."""
    offences = {
        module: names
        for module, source in modules()
        if module.split(".")[0] != "plugin" and (names := lightning_imports(source))
    }
    assert offences == {}


def test_nothing_imports_lightning_by_itself():
    """It comes in two packages, and a script may use either: what is wanted is taken from what is there."""
    offences = {
        module: names
        for module, source in modules()
        if (names := lightning_imports(source, typing_too=False))
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


@pytest.mark.long
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


def test_every_folder_has_its_floor():
    """A new folder, or a file beside the folders, is given one before anything is said of imports."""
    assert {folder_of(module) for module, _ in modules()} == set(FLOORS)


def test_no_folder_imports_one_that_is_not_below_it():
    """At the top of a file or nested."""
    assert [each for module, source in modules() for each in upward_imports(module, source)] == []


def test_no_file_imports_itself_through_others():
    """Neither within a folder nor across folders, at the top of a file or nested."""
    assert circle(dict(modules())) == []


@pytest.mark.parametrize(
    ("module", "offence"),
    [
        ("errors", "from lightning_sbckpt.meta import Checkpoint"),
        ("meta", "def f():\n    from lightning_sbckpt import _layout"),
        ("meta", "import lightning_sbckpt._layout.publish"),
        ("checkpointer", "from lightning_sbckpt.plugin.callback import SBCheckpoint"),
        ("checkpointer", "from lightning_sbckpt import Checkpoint"),
        ("_load.load", "from lightning_sbckpt._save import saver"),
        ("plugin.state.exact", "from ..callback import SBCheckpoint"),
        ("plugin.state.exact", "from .. import callback"),
    ],
)
def test_an_import_that_points_up_is_found(module, offence):
    """The check above can fail: absolute, relative and nested imports, and the package itself."""
    assert upward_imports(module, offence)


@pytest.mark.parametrize("nested", ["", "def f():\n    "])
def test_a_circle_is_found(nested):
    """The check above can fail, and it names the files."""
    sources = {
        "plugin.io": "from lightning_sbckpt.plugin.run import Run",
        "plugin.run": f"{nested}from lightning_sbckpt.plugin.callback import SBCheckpoint",
        "plugin.callback": "from lightning_sbckpt.plugin import io",
    }
    assert set(circle(sources)) == set(sources)


def test_an_import_for_type_checkers_may_point_up():
    """What never runs makes no cycle."""
    source = "if TYPE_CHECKING:\n    from lightning_sbckpt.meta import Checkpoint"
    assert not upward_imports("errors", source)
