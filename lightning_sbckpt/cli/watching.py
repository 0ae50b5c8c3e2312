"""The command `watch`: what a run saves and removes, as it happens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Group
from rich.live import Live
from rich.text import Text

from lightning_sbckpt._display.wording import printable, say_number
from lightning_sbckpt._views.columns import metric_keys, step_of
from lightning_sbckpt.cli._bars import hush
from lightning_sbckpt.cli._common import Failure, counted, echo, json_option
from lightning_sbckpt.cli._folders import Folder, open_folder
from lightning_sbckpt.cli._plan import standing
from lightning_sbckpt.cli._screen import Listing, listing_of, make_console
from lightning_sbckpt.meta import Checkpoint, ckpt_recency
from lightning_sbckpt.retention.noted import events_of, run_rules

__all__ = ["watch"]

# The head, the line below it, what was removed last, the prompt.
_OTHER_LINES = 6
_MOST_METRICS = 3


@click.command()
@click.argument("path", default=".", type=click.Path(path_type=Path))
@click.option("--interval", default=1.0, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Look once, print what is there, and end.")
@json_option
def watch(path: Path, interval: float, once: bool, as_json: bool) -> None:
    """Follow a run: a table that keeps up on a terminal, and a line for each event elsewhere.

    Ctrl+C ends it. With --json every event is one line of JSON.
    """
    folder = open_folder(path)
    console = make_console()
    # From here on there is a picture that moves, or a line for each event.
    hush()
    try:
        if once and not as_json:
            _print_once(folder)
        elif console.is_terminal and not as_json:
            with Live(console=console, auto_refresh=False) as live:
                last = ""
                for event in _events(folder, interval, once=once):
                    last = _in_words(event) if event is not None else last
                    live.update(_picture(folder, last, console.width, console.height), refresh=True)
        else:
            if not as_json:
                echo(f"{counted(len(folder.checkpoints))} in {printable(folder.shown)}")
            for event in _events(folder, interval, once=once, all_at_first=as_json):
                if event is not None:
                    _print_event(event, as_json)
    except KeyboardInterrupt:
        pass  # This is how it ends.


def _print_once(folder: Folder) -> None:
    if folder.checkpoints:
        _listing(folder, folder.checkpoints).show()
    else:
        echo(f"no checkpoints in {printable(folder.shown)}")
    for remark in folder.remarks:
        echo(remark)


def _listing(folder: Folder, shown: list[Checkpoint]) -> Listing:
    found = standing(folder, run_rules(folder.path))
    return listing_of(
        shown,
        metrics=metric_keys(shown, found.criterion.key)[:_MOST_METRICS],
        marks=found.marks,
        decisions=found.decisions,
    )


def _picture(folder: Folder, last: str, width: int, height: int) -> Group:
    room = max(1, height - _OTHER_LINES)
    shown = folder.checkpoints[:room]
    head = Text(
        f"{printable(folder.shown)}: {counted(len(folder.checkpoints))}; Ctrl+C ends",
        style="dim",
    )
    if not shown:
        return Group(head, Text(last))
    listing = _listing(folder, shown)
    if listing.remarks is not None:
        # On a screen that moves a table is a table: `ls` says the rest.
        listing = replace(listing, remarks=None)
    return Group(head, listing.drawn(width), Text(last, overflow="ellipsis", no_wrap=True))


def _events(
    folder: Folder, interval: float, *, once: bool, all_at_first: bool = False
) -> Iterator[dict[str, object] | None]:
    """Give what happens, and None at each look; the folder's checkpoints keep up with it."""
    known = {} if all_at_first else {ckpt.path.name: ckpt for ckpt in folder.checkpoints}
    while True:
        now = {ckpt.path.name: ckpt for ckpt in reversed(folder.checkpoints)}
        gone = [name for name in known if name not in now]
        reasons = _reasons(folder.path) if gone else {}
        for name, ckpt in now.items():
            if name not in known or ckpt_recency(known[name]) != ckpt_recency(ckpt):
                yield {"event": "saved", "name": name, "meta": _small(ckpt)}
        for name in gone:
            yield {"event": "removed", "name": name, "reason": reasons.get(name)}
        yield None
        if once:
            return
        known = now
        time.sleep(interval)
        if not folder.path.is_dir():
            raise Failure(f"{folder.shown} is gone: somebody removed or renamed it")
        folder.look()


def _reasons(root: Path) -> Mapping[str, str]:
    return {
        event["name"]: event["reason"] for event in events_of(root) if event["event"] == "removed"
    }


def _small(ckpt: Checkpoint) -> dict[str, object]:
    return {
        key: str(value) if isinstance(value, float) and value - value != 0 else value
        for key, value in ckpt.meta.items()
        if value is None or isinstance(value, (bool, int, float, str))
    }


def _print_event(event: Mapping[str, object], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(event))
    else:
        echo(_in_words(event))


def _in_words(event: Mapping[str, object]) -> str:
    name = printable(str(event["name"]))
    if event["event"] == "removed":
        return f"removed {name}: {printable(str(event['reason'] or 'nobody noted why'))}"
    meta = event["meta"]
    assert isinstance(meta, dict)
    record = Checkpoint(Path(name), meta, {})
    step = step_of(record)
    said = [] if step is None else [f"step {say_number(step)}"]
    said += [f"{key} {say_number(meta[key])}" for key in metric_keys([record])[:_MOST_METRICS]]
    return f"saved   {name}" + (f": {printable(', '.join(said))}" if said else "")
