"""Pictures of the checkpoints of a folder: the metric over steps, and what became of each.

They are drawn by matplotlib, an optional library. `Checkpointer.plot()` and the command
`lightning-sbckpt plot` come here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from lightning_sbckpt._display.wording import say_text
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._views.timeline import Timeline
from lightning_sbckpt.errors import (
    ConfigurationError,
    MissingDependencyError,
    SaveError,
    SelectionError,
)
from lightning_sbckpt.selection import importance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_timeline", "picture_kind", "save_figure", "svg_for_page"]

_KINDS = ("png", "svg")


def draw_timeline(
    timeline: Timeline,
    name: str,
    key: str | Sequence[str] | None = None,
    *,
    min_key: str | None = None,
    max_key: str | None = None,
) -> Figure:
    """Return a figure of a metric over steps, with every checkpoint that was made.

    Args:
        timeline: What happened to the checkpoints.
        name: What to call the whole.
        key: The metric, or several, each in a panel of its own; by default the one that the rules
            rank by first, else the first there is.
        min_key: A metric of which the lowest value is to be marked as the best.
        max_key: A metric of which the highest value is to be marked as the best.

    Returns:
        A figure of matplotlib's.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        SelectionError: No checkpoint has a number under such a key, or both `min_key` and
            `max_key` were given.

    Example:
        >>> from lightning_sbckpt._views.timeline import build_timeline
        >>> from lightning_sbckpt.meta import Checkpoint
        >>> there = [Checkpoint(Path("CKPT+a"), {"unixtime": 1.0, "loss": 0.5}, {})]
        >>> figure = draw_timeline(build_timeline(there, []), "my run")
        >>> figure.axes[0].get_ylabel()
        'loss'
    """
    require_matplotlib()
    from lightning_sbckpt._views import drawing

    keys, modes = chosen_keys(timeline, key, min_key=min_key, max_key=max_key)
    return drawing.draw(timeline, _title(timeline, name), keys, modes)


def svg_for_page(
    timeline: Timeline, keys: Sequence[str], modes: Mapping[str, Literal["min", "max"]]
) -> str:
    """Return the picture as an `<svg>` element without background, in the colour of the text around.

    Args:
        timeline: What happened to the checkpoints.
        keys: The metrics.
        modes: For a metric whether the lowest or the highest is best.

    Raises:
        MissingDependencyError: matplotlib is not installed.

    Example:
        >>> from lightning_sbckpt._views.timeline import build_timeline
        >>> svg_for_page(build_timeline([], []), [], {})[:4]
        '<svg'
    """
    require_matplotlib()
    from lightning_sbckpt._views import drawing

    # No other colour of the picture, and none that a name could bring in: it has to be replaced.
    ink = "#010203"
    figure = drawing.draw(timeline, "", keys, modes, ink=ink, background="none")
    text = drawing.rendered(figure, "svg").decode()
    text = text[text.index("<svg") :].replace(ink, "currentColor")
    # A page in dark colours has a lighter blue.
    return text.replace(drawing.KEPT.lower(), f"var(--kept, {drawing.KEPT.lower()})")


def chosen_keys(
    timeline: Timeline,
    key: str | Sequence[str] | None,
    *,
    min_key: str | None = None,
    max_key: str | None = None,
) -> tuple[list[str], dict[str, Literal["min", "max"]]]:
    """Return the metrics to draw, and which way each of them is best.

    Raises:
        SelectionError: See `draw_timeline`.
    """
    asked = importance(min_key=min_key, max_key=max_key).key
    modes = timeline.modes()
    if asked is not None:
        modes[asked] = "min" if min_key is not None else "max"
    if key is not None:
        keys = [key] if isinstance(key, str) else list(key)
    else:
        default = asked if asked is not None else timeline.main_metric()
        keys = [] if default is None else [default]
    if timeline.lives:
        _refuse_unknown(timeline, [*keys, *([asked] if asked is not None else [])])
    return list(dict.fromkeys(keys)), modes


def _refuse_unknown(timeline: Timeline, keys: Sequence[str]) -> None:
    there = timeline.metrics()
    for key in keys:
        if any(life.number(key) is not None for life in timeline.lives):
            continue
        close = difflib.get_close_matches(key, there, 1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        found = ", ".join(map(repr, there)) or "none at all"
        raise SelectionError(
            f"{key!r} can't be drawn: none of the {len(timeline.lives)} checkpoints has a number "
            f"under that key. Keys with numbers are: {say_text(found, 500)}{hint}"
        )


def _title(timeline: Timeline, name: str) -> str:
    made = len(timeline.lives)
    kept = sum(life.state == "there" for life in timeline.lives)
    if not made:
        return f"{name}: no checkpoints yet"
    what = "checkpoint" if made == 1 else "checkpoints"
    return f"{name}: {made:,} {what} made, {kept:,} kept"


def picture_kind(path: str | Path) -> Literal["png", "svg"]:
    """Return which kind of picture a file is to hold, by the ending of its name.

    Args:
        path: The file.

    Raises:
        ConfigurationError: It ends in neither `.png` nor `.svg`.

    Example:
        >>> picture_kind("run.SVG")
        'svg'
    """
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending not in _KINDS:
        raise ConfigurationError(
            f"{path} can't be drawn: it ends in {Path(path).suffix!r}, expected '.png' or '.svg'. "
            f"Name it {Path(path).with_suffix('.png').name}, for example"
            if Path(path).name
            else f"{path} can't be drawn: it names no file. End it in '.png' or '.svg'"
        )
    return cast("Literal['png', 'svg']", ending)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG or SVG, by the ending of the name; the old file or the new, whole.

    Args:
        figure: The figure.
        path: The file; one that is there is replaced.

    Returns:
        The file.

    Raises:
        ConfigurationError: The name ends in something else.
        SaveError: The file can't be written.

    Example:
        >>> import tempfile
        >>> from lightning_sbckpt._views.timeline import build_timeline
        >>> figure = draw_timeline(build_timeline([], []), "empty")
        >>> save_figure(figure, Path(tempfile.mkdtemp()) / "a.png").read_bytes()[1:4]
        b'PNG'
    """
    kind = picture_kind(path)
    from lightning_sbckpt._views import drawing

    return write_page(path, drawing.rendered(figure, kind), "picture")


def write_page(path: str | Path, data: bytes, what: str) -> Path:
    """Write a file in one step.

    Raises:
        SaveError: It can't be written.
    """
    target = Path(path)
    try:
        LocalStorage().replace(target, data)
    except OSError as error:
        raise SaveError(
            f"The {what} {target} can't be written: {error.strerror or error}. Name a file in a "
            "folder that exists and that you may write to"
        ) from error
    return target


def require_matplotlib() -> None:
    """Refuse in words if matplotlib is not there.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401 - whether it can be
    except ImportError as error:
        raise MissingDependencyError(
            "Cannot draw checkpoints: the library matplotlib is not installed. Install it with: "
            "pip install 'lightning-sbckpt[plot]'"
        ) from error
