"""The commands that change a folder: `prune`, `pin`, `unpin`, `annotate`."""

from __future__ import annotations

import datetime as dt
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import yaml

from lightning_sbckpt._display.wording import printable, say_number, say_size
from lightning_sbckpt._io.progress import Tally
from lightning_sbckpt._layout.history import History
from lightning_sbckpt._remote.places import display_path
from lightning_sbckpt._views.columns import freed_by, metric_keys
from lightning_sbckpt.cli._bars import progress_bar
from lightning_sbckpt.cli._common import Failure, counted, echo, json_option, print_json
from lightning_sbckpt.cli._folders import Folder, locate, open_folder
from lightning_sbckpt.cli._plan import careful_plan, chosen_rules, rule_options
from lightning_sbckpt.cli._screen import listing_of
from lightning_sbckpt.inspect import marks_of
from lightning_sbckpt.retention import Decision
from lightning_sbckpt.retention.noted import RunRules, best_by, run_rules
from lightning_sbckpt.retention.protected import Protected
from lightning_sbckpt.selection import Criterion

__all__ = ["annotate", "pin", "prune", "unpin"]


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@rule_options
@click.option("--yes", is_flag=True, help="Remove them. Without it this is a dry run.")
@click.option("--all-runs", is_flag=True, help="Also what another run wrote, and averages.")
@click.option("--also-newest", is_flag=True, help="Also the newest that is whole.")
@json_option
def prune(
    path: Path,
    yes: bool,
    all_runs: bool,
    also_newest: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Remove the checkpoints in PATH that no rule keeps: a dry run, unless --yes is given.

    The rules are those given, or those that the run follows. What is pinned stays; so do the newest
    checkpoint that is whole, and what another run wrote, unless told otherwise.
    """
    folder = open_folder(path)
    folder.warn()
    rules = chosen_rules(folder, **options)
    if rules.unknown:
        raise Failure(
            f"nothing was removed from {folder.shown}: the rule {rules.unknown[0]} of the run can't be read "
            "back. Give all rules with --keep, --min-key or --max-key"
        )
    if not rules.rules:
        raise Failure(
            f"nothing was removed from {folder.shown}: no rules were given, and the run noted none. Give "
            "them with --keep 'Best(\"val_loss\", 2)', --min-key or --max-key"
        )
    decisions, protected = careful_plan(folder, rules, all_runs=all_runs, also_newest=also_newest)
    going = [each.checkpoint.path for each in decisions if not each.keep]
    freed = freed_by(going)
    if decisions and not as_json:
        _print_plan(rules, decisions)
    if yes and going:
        with ExitStack() as stack:
            tally = Tally(progress_bar(stack, "removing"), freed)
            stack.enter_context(tally.part(freed))
            decisions = _carry_out(folder, rules, protected)
        going = [each.checkpoint.path for each in decisions if not each.keep]
    if as_json:
        print_json(
            {
                "folder": folder.shown,
                "removed": yes,
                "bytes_freed": freed,
                "plan": [
                    {
                        "name": each.checkpoint.path.name,
                        "stays": each.keep,
                        "reason": each.reason,
                    }
                    for each in decisions
                ],
            }
        )
        return
    counts = counted(len(going), of=len(decisions))
    if not going:
        echo(f"nothing to remove: what is there stays, {counted(len(decisions))}")
    elif yes:
        echo(f"removed {counts}, {say_size(freed)} are free")
    else:
        echo(f"a dry run: {counts} would go, {say_size(freed)} would be free. --yes removes them")


def _print_plan(rules: RunRules, decisions: list[Decision]) -> None:
    criterion = best_by(rules.rules) or Criterion()
    ckpts = [each.checkpoint for each in decisions]
    listing_of(
        ckpts,
        metrics=metric_keys(ckpts, criterion.key)[:1],
        marks=marks_of(ckpts, criterion),
        decisions={each.checkpoint.path: each for each in decisions},
    ).show()


def _carry_out(folder: Folder, rules: RunRules, protected: Protected) -> list[Decision]:
    from lightning_sbckpt.folder import CheckpointFolder

    before = run_rules(folder.path)
    checkpoints = CheckpointFolder(folder.path)
    # First of all: where a run is saving, nothing is removed and nothing is noted.
    checkpoints.claim()
    try:
        done = checkpoints.apply_retention(
            rules.rules, ckpt_predicate=protected, protected=protected.reasons
        )
    finally:
        checkpoints.close()
    if before.texts:
        # What was done by hand, once, is not what the run follows.
        noted = [_AsWritten(text) for text in before.texts]
        History(folder.path).kept_by(noted, before.predicate)
    return done


class _AsWritten:
    """A rule as the history has it, to be noted again."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


@click.command()
@click.argument(
    "ckpts", nargs=-1, required=True, metavar="CKPT...", type=click.Path(path_type=Path)
)
@click.option("--reason", default="", help="Why, for whoever looks at it later.")
@json_option
def pin(ckpts: tuple[Path, ...], reason: str, as_json: bool) -> None:
    """Keep checkpoints whatever the rules say, until they are unpinned."""
    from lightning_sbckpt.folder import CheckpointFolder

    pinned = [locate(each) for each in ckpts]
    for folder, found in pinned:
        CheckpointFolder(folder.path, access="shared").pin(found, reason)
        if not as_json:
            why = f": {printable(reason)}" if reason else ""
            echo(f"pinned {printable(found.path.name)}{why}")
    if as_json:
        print_json([{"path": display_path(found.path), "pinned": True} for _, found in pinned])


@click.command()
@click.argument(
    "ckpts", nargs=-1, required=True, metavar="CKPT...", type=click.Path(path_type=Path)
)
@json_option
def unpin(ckpts: tuple[Path, ...], as_json: bool) -> None:
    """Let the rules remove checkpoints again."""
    from lightning_sbckpt.folder import CheckpointFolder

    pinned = [locate(each) for each in ckpts]
    for folder, found in pinned:
        CheckpointFolder(folder.path, access="shared").unpin(found)
        if not as_json:
            was = "unpinned" if found.meta.get("pinned") else "not pinned anyway:"
            echo(f"{was} {printable(found.path.name)}")
    if as_json:
        print_json([{"path": display_path(found.path), "pinned": False} for _, found in pinned])


@click.command()
@click.argument("ckpt", type=click.Path(path_type=Path))
@click.argument("values", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--note", help="A sentence to add.")
@click.option("--tag", "tags", multiple=True, help="A word to find it by. May be given again.")
@json_option
def annotate(
    ckpt: Path,
    values: tuple[str, ...],
    note: str | None,
    tags: tuple[str, ...],
    as_json: bool,
) -> None:
    """Add to CKPT what became known later: metrics, a note, tags.

    A metric counts as if it had been saved with the checkpoint: ranking and rules see it. Values
    are read as in YAML: 31.5 is a number, true a truth, anything else a text.
    """
    from lightning_sbckpt.folder import CheckpointFolder

    if not (values or note or tags):
        raise Failure("nothing to annotate: expected KEY=VALUE, --note or --tag")
    meta = dict(map(_key_and_value, values))
    folder, found = locate(ckpt)
    CheckpointFolder(folder.path, access="shared").annotate(found, meta, note=note, tags=tags)
    if as_json:
        print_json({"path": display_path(found.path), "meta": meta, "note": note, "tags": tags})
        return
    texts = [f"{key} {say_number(value) or 'empty'}" for key, value in meta.items()]
    texts += ["a note"] * bool(note) + [f"tag {tag}" for tag in tags]
    echo(f"annotated {printable(found.path.name)}: {printable(', '.join(texts))}")


def _key_and_value(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise Failure(f"{text!r} can't be annotated: expected KEY=VALUE, such as bleu=31.5")
    # YAML 1.1 takes these for texts, and nobody else does.
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return key, float(value)
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value
    if isinstance(found, (dict, list, set, bytes)):
        raise Failure(
            f"{text!r} can't be annotated: its value is a {type(found).__name__}, expected one "
            f"number, truth or text. Put a text in quotes: {key}='\"...\"'"
        )
    return key, value if isinstance(found, (dt.date, dt.datetime)) else found
