"""Pictures show every checkpoint that was made and what became of it, whatever names and values are."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
import warnings
import xml.etree.ElementTree as ET

import pytest
import torch
from _lives import LOSSES, record, removed, rules, saved, small_run
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._views.timeline import build_timeline
from lightning_sbckpt.errors import (
    ConfigurationError,
    MissingDependencyError,
    SaveError,
    SelectionError,
)
from lightning_sbckpt.folder import CheckpointFolder
from lightning_sbckpt.plotting import draw_timeline, save_figure, svg_for_page

KEPT, BEST = "#0072b2", "#e69f00"


@pytest.fixture
def checkpointer(tmp_path):
    return small_run(tmp_path / "run")


def points(axes, *, marker, filled=None, size=None):
    """Return the (x, y) of all points with a marker, filled or hollow."""
    found = []
    for line in axes.lines:
        hollow = str(line.get_markerfacecolor()) == "none"
        if line.get_marker() != marker or (filled is not None and filled is hollow):
            continue
        if size is None or size(line.get_markersize()):
            found += zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True)
    return sorted(found)


def without_value(axes, marker):
    return [x for x, _ in points(axes, marker=marker)]


def texts(figure):
    found = [figure.get_suptitle()]
    for axes in figure.axes:
        found += [text.get_text() for text in axes.texts] + [axes.get_ylabel(), axes.get_xlabel()]
    return found


def test_what_is_there_is_filled_and_what_was_removed_is_hollow(checkpointer):
    """The metric is that of the run's rule, over the global step."""
    (axes, _) = checkpointer.plot().axes
    assert axes.get_ylabel() == "loss\n(lowest is best)"
    assert axes.get_xlabel() == "global step"
    assert points(axes, marker="o", filled=True) == [
        (200, 0.7),
        (600, 0.3),
        (700, 0.4),
        (800, 0.45),
    ]
    assert points(axes, marker="o", filled=False) == [(100, 0.9), (400, 0.5), (500, 0.6)]


def test_the_best_and_the_pinned_are_marked(checkpointer):
    """The best by a star in a colour of its own, the pinned by a frame."""
    axes = checkpointer.plot().axes[0]
    assert points(axes, marker="*") == [(600, 0.3)]
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    assert to_hex(star.get_markerfacecolor()) == BEST
    assert points(axes, marker="s") == [(200, 0.7)]


def test_what_was_removed_is_not_shown_as_pinned():
    """Somebody may have removed the folder of one that was."""
    events = [saved("a", 1, loss=0.5, pinned="once"), saved("b", 2, loss=0.25)]
    axes = draw_timeline(build_timeline([record("b", 2, loss=0.25)], events), "run").axes[0]
    assert points(axes, marker="s") == []


def test_what_has_no_place_on_the_axis_stands_at_the_bottom(checkpointer):
    """NaN as a cross; a checkpoint without the metric as a tick."""
    axes = checkpointer.plot().axes[0]
    assert without_value(axes, "x") == [300]
    assert without_value(axes, "|") == [400, 800]
    heights = {y for marker in "x|" for _, y in points(axes, marker=marker)}
    assert heights == {0.035}


def test_a_resume_is_a_line_at_its_checkpoint_with_a_note(checkpointer):
    """The note names the checkpoint and the step."""
    figure = checkpointer.plot()
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in lines] == [[400, 400]]
    assert "1  resumed from CKPT+halt400 at global step 400" in texts(figure)


def test_a_resume_without_a_place_is_drawn_before_the_save_that_followed():
    """Where a run counts nothing, its saves are counted."""
    events = [saved("a", 1, loss=1.0), saved("b", 2, {"resumed-from": "a"}, loss=0.5)]
    figure = draw_timeline(build_timeline([], events), "run")
    (line,) = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert list(line.get_xdata()) == [1.5, 1.5]
    assert figure.axes[0].get_xlabel() == "number of the save"
    assert "1  resumed from a" in texts(figure)


def test_only_the_first_of_many_resumes_are_noted():
    """And the others counted."""
    events = []
    for number in range(30):
        lineage = {"resumed-from": str(number - 1)} if number else {}
        events.append(saved(str(number), number, lineage, loss=1.0, step=number))
    figure = draw_timeline(build_timeline([], events), "run")
    notes = [text.get_text() for text in figure.axes[-1].texts]
    assert len(notes) == 6
    assert notes[-1] == "… and 24 more"


def test_training_that_was_repeated_is_a_line_of_its_own():
    """The lines before and after a resume are not joined."""
    events = [saved(str(n), n, loss=1.0, step=n) for n in range(1, 4)]
    events += [saved(f"{n}b", n + 2, {"resumed-from": "2"}, loss=0.9, step=n) for n in range(3, 6)]
    axes = draw_timeline(build_timeline([], events), "run").axes[0]
    courses = [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in courses] == [[1, 2, 3], [3, 4, 5]]


def test_ephemeral_ones_are_smaller():
    """They were saved for recovery only."""
    there = [record("a", 1, loss=1.0), record("b", 2, loss=0.5, ephemeral=True)]
    axes = draw_timeline(build_timeline(there, []), "run").axes[0]
    circles = [line for line in axes.lines if line.get_marker() == "o"]
    (large,) = {line.get_markersize() for line in circles if 1.0 in line.get_ydata()}
    assert points(axes, marker="o", size=lambda size: size < large) == [(2, 0.5)]


def test_an_unreadable_one_is_shown_where_its_metric_was():
    """As a cross that is filled."""
    timeline = build_timeline([], [saved("a", 1, loss=0.5)], unreadable={"a": "damaged"})
    assert points(draw_timeline(timeline, "run").axes[0], marker="X") == [(1, 0.5)]


def test_several_keys_are_several_panels(checkpointer):
    """One above the other, over the same steps; those without a rule have no best."""
    figure = checkpointer.plot(["acc", "loss"])
    first, second, _ = figure.axes
    assert (first.get_ylabel(), second.get_ylabel()) == ("acc", "loss\n(lowest is best)")
    assert first.get_xlim() == second.get_xlim()
    assert (points(first, marker="*"), points(second, marker="*")) == ([], [(600, 0.3)])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_key": "acc"}, ("acc\n(highest is best)", (600, 0.7))),
        ({"min_key": "acc"}, ("acc\n(lowest is best)", (200, 1 - 0.7))),
        ({"key": "acc", "max_key": "acc"}, ("acc\n(highest is best)", (600, 0.7))),
        ({"key": "loss", "max_key": "loss"}, ("loss\n(highest is best)", (200, 0.7))),
    ],
)
def test_which_way_is_best_can_be_said(checkpointer, arguments, expected):
    """Before what the rules say."""
    axes = checkpointer.plot(**arguments).axes[0]
    assert axes.get_ylabel() == expected[0]
    (best,) = points(axes, marker="*")
    assert best == pytest.approx(expected[1])


def test_a_key_that_nobody_has_is_refused_with_those_there_are(checkpointer):
    """And with the one that was probably meant."""
    with pytest.raises(SelectionError) as caught:
        checkpointer.plot("los")
    assert str(caught.value) == (
        "'los' can't be drawn: none of the 10 checkpoints has a number under that key. Keys with "
        "numbers are: 'loss', 'acc'. Did you mean 'loss'?"
    )
    with pytest.raises(SelectionError, match="they may contradict each other"):
        checkpointer.plot(min_key="loss", max_key="acc")


@pytest.mark.parametrize(("name", "begin"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_the_ending_says_which_kind_of_file_is_written(checkpointer, tmp_path, name, begin):
    """A file that is there is replaced, and nothing else is left."""
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.write_bytes(b"old")
    figure = checkpointer.plot(path=path)
    assert isinstance(figure, Figure)
    assert path.read_bytes().startswith(begin)
    assert os.listdir(path.parent) == [name]


@pytest.mark.parametrize(
    ("name", "found"),
    [("a.gif", "it ends in '.gif'"), ("a", "it ends in ''"), ("a.png.", "it ends in ''")],
)
def test_another_ending_is_refused(checkpointer, tmp_path, name, found):
    """With one that is understood."""
    with pytest.raises(ConfigurationError, match=f"{found}, expected '.png' or '.svg'. Name it a"):
        checkpointer.plot(path=tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_file_that_cannot_be_written_is_said(checkpointer, tmp_path):
    """With what the system says of it; a folder in the way stays."""
    with pytest.raises(SaveError, match=r"a\.png can't be written: No such file or directory"):
        checkpointer.plot(path=tmp_path / "missing" / "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(SaveError, match=r"The picture .*b\.png can't be written: Is a directory"):
        checkpointer.plot(path=tmp_path / "b.png")


def test_a_folder_without_history_draws_what_is_there(checkpointer):
    """With the resume that the manifests tell of."""
    root = checkpointer.checkpoints_dir
    (root / "HISTORY.jsonl").unlink()
    figure = CheckpointFolder(root, access="read").plot("loss", min_key="loss")
    assert figure.get_suptitle() == "run: 5 checkpoints made, 5 kept"
    assert len(points(figure.axes[0], marker="o", filled=True)) == 4
    assert points(figure.axes[0], marker="o", filled=False) == []
    assert "1  resumed from CKPT+halt400" in texts(figure)


def test_a_history_that_cannot_be_read_is_gone_on_without(checkpointer, caplog):
    """With a warning."""
    path = checkpointer.checkpoints_dir / "HISTORY.jsonl"
    path.unlink()
    path.mkdir()
    assert len(points(checkpointer.plot("loss").axes[0], marker="o")) == 4
    assert "going on without the history" in caplog.text


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_folder_without_checkpoints_or_metrics_can_be_drawn(tmp_path, ending):
    """So that a script that draws every run need not ask first."""
    checkpointer = Checkpointer(tmp_path / "run", {"model": torch.nn.Linear(1, 1)})
    figure = checkpointer.plot("loss", path=tmp_path / f"a.{ending}")
    assert figure.get_suptitle() == "run: no checkpoints yet"
    checkpointer.save_checkpoint({"step": 5})
    figure = checkpointer.plot(path=tmp_path / f"a.{ending}")
    assert figure.get_suptitle() == "run: 1 checkpoint made, 1 kept"
    assert without_value(figure.axes[0], "|") == [5]


def test_drawing_changes_nothing_in_the_folder(checkpointer, tree_bytes):
    """No lock, no index, no note."""
    root = checkpointer.checkpoints_dir
    before = tree_bytes(root)
    CheckpointFolder(root, access="read").plot()
    assert tree_bytes(root) == before


def test_no_name_is_read_as_a_formula_or_as_markup(tmp_path):
    """In a title, at an axis, in a note; and letters that no font has are no warning."""
    key, name = r"$\frac{<b>$", "a<&>$x_$ \x1b\n\u2603"
    events = [rules(f"Best(key={key!r})"), saved(name, 1, **{key: 0.5, "step": 1, "日本": 1.0})]
    events.append(saved("b", 2, {"resumed-from": name}, **{key: 0.25, "step": 2}))
    timeline = build_timeline([], events)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_timeline(timeline, name, [key, "日本"])
        save_figure(figure, tmp_path / "a.png")
        save_figure(figure, tmp_path / "a.svg")
    ET.parse(tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert "<b>" not in svg
    assert r"$\frac{&lt;b&gt;$" in svg
    assert "a&lt;&amp;&gt;$x_$" in svg


def test_values_beyond_all_axes_are_drawn_at_the_bottom(tmp_path):
    """Without a warning of any library."""
    values = [1e308, -1e308, 10**400, math.inf, 0.5, 1e-320]
    there = [record(str(n), n, loss=v, step=10**n) for n, v in enumerate(values)]
    there.append(record("far", 9, loss=0.25, step=10**200))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_timeline(build_timeline(there, []), "run")
        save_figure(figure, tmp_path / "a.png")
    assert without_value(figure.axes[0], "x") == [1, 10, 100, 1000]


def test_the_same_run_is_the_same_file(checkpointer, tmp_path):
    """So that a picture in a repository changes only when the run does."""
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        checkpointer.plot(path=tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_notebook_shows_the_figure_without_any_set_up(checkpointer):
    """As a PNG."""
    assert checkpointer.plot()._repr_png_().startswith(b"\x89PNG")


def test_the_picture_on_a_page_has_the_colour_of_its_text(checkpointer):
    """And no background: the page may be light or dark."""
    svg = svg_for_page(checkpointer.timeline(), ["loss"], {"loss": "min"})
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert f"var(--kept, {KEPT})" in svg
    assert "fill: #ffffff" not in svg and "fill: white" not in svg


def test_without_matplotlib_the_extra_is_named(checkpointer, monkeypatch):
    """It is not needed for anything else."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lightning-sbckpt\[plot\]'"):
        checkpointer.plot()


LOADED = """
import sys, lightning_sbckpt
checkpointer = lightning_sbckpt.Checkpointer(sys.argv[1], access="read")
checkpointer._repr_html_()
assert "matplotlib" not in sys.modules, "without a picture"
checkpointer.plot(path=sys.argv[2])
assert "matplotlib.pyplot" not in sys.modules, "a picture"
"""


@pytest.mark.long
def test_matplotlib_is_loaded_for_a_picture_alone_and_pyplot_never(checkpointer, tmp_path):
    """It is slow to load, and the figures of pyplot are the user's."""
    subprocess.run(
        [sys.executable, "-c", LOADED, checkpointer.checkpoints_dir, tmp_path / "a.png"], check=True
    )


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_three_thousand_checkpoints_are_drawn_in_two_seconds(tmp_path, ending):
    """Most of them removed, some without a metric."""
    events = [rules("Best(key='loss', n=5)")]
    for n in range(3000):
        meta = {"loss": math.exp(-n / 900)} if n % 7 else {}
        events.append(saved(str(n), n, step=100 * n, **meta))
        if n % 10:
            events.append(removed(str(n), n + 1))
    there = [record(str(n), n, loss=math.exp(-n / 900), step=100 * n) for n in range(0, 3000, 10)]
    begin = time.process_time()
    timeline = build_timeline(there, events)
    save_figure(draw_timeline(timeline, "run"), tmp_path / f"a.{ending}")
    assert time.process_time() - begin < 2
    assert (tmp_path / f"a.{ending}").stat().st_size < 1_000_000


def test_every_checkpoint_with_a_number_is_drawn_once(checkpointer):
    """None is dropped, none twice."""
    axes = checkpointer.plot().axes[0]
    drawn = [y for _, y in points(axes, marker="o")]
    assert sorted(drawn) == sorted(loss for loss in LOSSES if not math.isnan(loss))
