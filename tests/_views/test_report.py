"""A report is one page that is complete in itself, tells all that is known, and runs nothing foreign."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from _lives import small_run
from _releases import needs_torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt.errors import CheckpointNotFoundError, SaveError, SelectionError
from lightning_sbckpt.report import report
from lightning_sbckpt.retention import Newest

MARKUP = "<img src=x onerror=alert(1)>\"'&<b>"


class Reader(HTMLParser):
    """Keeps what a browser would make of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.rows, self._open = [], [], [], []
        self.texts = {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "input"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, f"{tag} is closed and not open"

    def handle_data(self, data):
        self.texts[self._open[-1] if self._open else ""] = (
            self.texts.get(self._open[-1] if self._open else "", "") + data + "\n"
        )
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data.strip()

    def table(self, first):
        """Return the rows below the heading that begins with a word, as dictionaries."""
        (start,) = [number for number, row in enumerate(self.rows) if row[0] == first]
        head = self.rows[start]
        found = []
        for row in self.rows[start + 1 :]:
            if len(row) != len(head) or row[0] in ("run", "since", "resumed from", "average"):
                break
            found.append(dict(zip(head, row, strict=True)))
        return found

    def facts(self):
        return dict(zip(self.texts["dt"].split("\n"), self.texts["dd"].split("\n"), strict=True))


def read(path):
    html = path.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    return Reader(html)


@pytest.fixture
def run(tmp_path):
    return small_run(tmp_path / "run").checkpoints_dir


def test_every_checkpoint_is_told_of_with_what_became_of_it(run, tmp_path):
    """One row each, the newest first, with the reason to stay or to go."""
    path = report(run, tmp_path / "a.html")
    assert path == tmp_path / "a.html"
    page = read(path)
    rows = page.table("name")
    assert [row["name"] for row in rows] == [
        "halt800",
        *(f"step{n}00" for n in (8, 7, 6, 5)),
        "halt400",
        *(f"step{n}00" for n in (4, 3, 2, 1)),
    ]
    by_name = {row["name"]: row for row in rows}
    best = by_name["step600"]
    assert (best["state"], best["marks"], best["loss"], best["global_step"]) == (
        "kept",
        "best loss",
        "0.3",
        "600",
    )
    assert best["why"] == "among the 2 best loss (min): 0.3"
    assert by_name["step800"]["why"].startswith("goes next: not among the 2 best loss")
    assert by_name["step200"]["marks"] == "pinned"
    assert by_name["step200"]["why"] == "pinned: in the paper"
    gone = by_name["step500"]
    assert gone["state"] == "removed"
    assert gone["why"].endswith(": not among the 2 best loss, older than the newest 1")
    assert (gone["on disk"], best["on disk"][-2:]) == ("", "KB")
    assert by_name["step300"]["loss"] == "nan"


def test_it_opens_with_the_best_its_path_and_its_hyperparameters(run, tmp_path):
    """As text: what somebody looks for first, and copies."""
    (run / "CKPT+step600" / "hparams.yaml").write_text("lr: 0.01\nlayers: [64, 64]\n")
    html = report(run, tmp_path / "a.html").read_text()
    top = re.sub(r"<[^>]+>", "", html.partition("<header>")[2].partition("<dl")[0])
    title, place, given = [line.strip() for line in top.splitlines() if line.strip()][2:]
    assert title == "best: lowest loss0.3"
    assert place.startswith("global step 600, epoch 3, saved ")
    assert place.endswith(str(run / "CKPT+step600"))
    assert given == "lr 0.01 layers [64, 64]"
    (run / "HISTORY.jsonl").unlink()
    assert "newest" in report(run, tmp_path / "b.html").read_text().partition("<dl")[0]


def test_the_heading_counts(run, tmp_path):
    """What was made, kept, removed and resumed, and what is on the disk."""
    facts = read(report(run, tmp_path / "a.html")).facts()
    assert (facts["made"], facts["kept"], facts["removed"], facts["resumed"]) == (
        "10",
        "5",
        "5",
        "once",
    )
    assert facts["on the disk"].endswith("KB")
    assert {"first saved", "last change"} <= set(facts)
    assert "damaged" not in facts


def test_lineage_and_rules_are_told(run, tmp_path):
    """Which run, from where it went on, and by which rules it kept."""
    page = read(report(run, tmp_path / "a.html"))
    assert [(row["run"], row["made"], row["kept"]) for row in page.table("run")] == [
        ("1234abcd", "10", "5")
    ]
    assert page.table("resumed from") == [
        {
            "resumed from": "halt400",
            "at": "global step 400",
            "first saved afterwards": "step500",
        }
    ]
    assert [row["rule"] for row in page.table("since")] == [
        "Best(key='loss', n=2, mode='min', ephemeral=False)",
        "Newest(n=1, ephemeral=True)",
    ]


def test_an_average_is_told_with_its_sources(tmp_path):
    """From its meta or its manifest."""
    checkpointer = Checkpointer(tmp_path / "run", {"model": torch.nn.Linear(1, 1)})
    checkpointer.save_checkpoint({"averaged-from": ["CKPT+a", "CKPT+b"]}, name="mean")
    rows = read(report(tmp_path / "run")).table("average")
    assert rows == [{"average": "mean", "of": "a, b"}]


@needs_torch("2.6", "torch.serialization.skip_data, by which files are linked,")
def test_bytes_that_are_shared_are_counted_once(tmp_path):
    """Each checkpoint says what would be free if it alone went."""
    frozen = torch.nn.Linear(300, 300)
    with Checkpointer(tmp_path / "run", {"frozen": frozen}) as checkpointer:
        first, second = (checkpointer.save_checkpoint(name=name) for name in "ab")
    if not first.paramfiles["frozen"].samefile(second.paramfiles["frozen"]):
        pytest.fail("the files are not shared, so this test says nothing")
    page = read(report(tmp_path / "run"))
    facts, rows = page.facts(), page.table("name")
    assert float(facts["of it shared"].split()[0]) == pytest.approx(364, rel=0.02)
    assert float(facts["on the disk"].split()[0]) < 400
    assert all(row["on disk"] > "36" and float(row["own"].split()[0]) < 20 for row in rows)


def test_damaged_and_unreadable_ones_stand_at_the_top(run, tmp_path):
    """By presence and size, and with `verify` by every byte."""
    (run / "CKPT+step700" / "model.ckpt").write_bytes(b"short")
    (run / "CKPT+step800" / "CKPT.yaml").write_text("[")
    file = run / "CKPT+step600" / "model.ckpt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    page = read(report(run, tmp_path / "a.html"))
    states = {row["name"]: row["state"] for row in page.table("name")}
    assert states["step700"] == "damaged"
    assert states["step800"] == "unreadable"
    assert states["step600"] == "kept"
    assert re.search(
        r"CKPT\+step700: model.ckpt has 5 bytes, [\d,]+ were written", page.texts["li"]
    )
    assert re.search(r"CKPT\+step800: .*CKPT.yaml can't be read as safe YAML", page.texts["li"])
    page = read(report(run, tmp_path / "a.html", verify=True))
    assert "CKPT+step600: model.ckpt has other bytes than were written" in page.texts["li"]


def test_nothing_in_the_folder_changes(run, tmp_path, tree_bytes):
    """By default the page itself comes there."""
    before = tree_bytes(run)
    report(run, tmp_path / "a.html")
    assert tree_bytes(run) == before
    assert report(run) == run / "report.html"
    assert set(tree_bytes(run)) - set(before) == {"report.html"}


def test_the_page_needs_nothing_from_elsewhere(run, tmp_path):
    """No address of anything, and a policy under which a browser would not fetch it."""
    path = report(run, tmp_path / "a.html")
    page = read(path)
    for tag, name, value in page.attributes:
        assert name not in ("src", "action", "data", "poster"), (tag, value)
        if name in ("href", "xlink:href"):
            assert value.startswith("#"), (tag, value)
    assert "link" not in page.tags and "iframe" not in page.tags
    style = "".join(re.findall(r"<style.*?</style>", path.read_text(), re.DOTALL))
    assert "@import" not in style and "url(http" not in style
    (policy,) = [
        value for _, name, value in page.attributes if name == "content" and "default-src" in value
    ]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


def test_the_policy_allows_the_script_of_the_page_and_no_other(run, tmp_path):
    """By the checksum of the very bytes between the tags."""
    html = report(run, tmp_path / "a.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert html.count("<script") == 1


@pytest.fixture
def hostile(tmp_path):
    """A folder of which every name and every value is markup."""
    root = tmp_path / f"run{MARKUP}"
    checkpointer = Checkpointer(root, {"model": torch.nn.Linear(1, 1)})
    checkpointer.lineage = {"run": MARKUP, "resumed-from": f"{MARKUP}0"}
    for number in range(4):
        meta = {MARKUP: 0.5, "x": number, "step": number, "note": MARKUP, "tag\x1b[2J": math.inf}
        checkpointer.save_checkpoint(meta, name=f"{number}{MARKUP}\u2028")
        checkpointer.apply_retention([Newest(2)])
    for number in range(2):
        bad = root / f"CKPT+bad{number}{MARKUP}"
        bad.mkdir()
        (bad / "CKPT.yaml").write_text(f"[{MARKUP}")
    newest = checkpointer.find_checkpoint().path
    (newest / "MANIFEST.yaml").write_text(MARKUP)
    (newest / "hparams.yaml").write_text(json.dumps({f"lr{MARKUP}": MARKUP}))
    history = root / "HISTORY.jsonl"
    event = '{{"event": {0}, "time": 1e300, "name": {1}, "reason": {1}, "rules": [{1}]}}\n'
    with history.open("a") as stream:
        for kind in ("removed", "rules"):
            stream.write(event.format(json.dumps(kind), json.dumps(f"</script>{MARKUP}")))
    return root


def test_names_and_meta_never_become_markup_or_script(hostile, tmp_path):
    """Whoever wrote them: the page may be shown to others."""
    path = report(hostile, tmp_path / "a.html", key=[MARKUP, "x"])
    page = read(path)
    assert "img" not in page.tags and "b" not in page.tags
    assert page.tags.count("script") == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert {row["state"] for row in page.table("name")} == {
        "kept",
        "removed",
        "damaged",
        "unreadable",
    }
    assert page.texts["h1"].strip() == f"run{MARKUP}"
    assert "\x1b" not in path.read_text()
    assert f"lr{MARKUP}" in page.texts["span"]


def test_without_matplotlib_there_is_a_page_without_a_picture(run, tmp_path, monkeypatch):
    """And it says how to get one."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = read(report(run, tmp_path / "a.html"))
    assert "pip install 'lightning-sbckpt[plot]'" in page.texts["p"]
    assert len(page.table("name")) == 10


def test_a_folder_without_history_or_without_checkpoints_has_a_page(run, tmp_path):
    """Which says what is not known."""
    (run / "HISTORY.jsonl").unlink()
    page = read(report(run, tmp_path / "a.html"))
    assert [row["state"] for row in page.table("name")] == ["kept"] * 5
    assert "what was removed is not known" in page.texts["p"]
    (tmp_path / "empty").mkdir()
    page = read(report(tmp_path / "empty", key="loss"))
    assert "No checkpoints yet." in page.texts["p"]


def test_what_cannot_be_done_is_said(run, tmp_path):
    """A wrong folder, a wrong key, a place that can't be written to."""
    with pytest.raises(CheckpointNotFoundError, match=r"no report on .*missing: .*found nothing"):
        report(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointNotFoundError, match="found a file"):
        report(tmp_path / "file")
    with pytest.raises(SelectionError, match=r"'lost' can't be drawn.*Did you mean 'loss'"):
        report(run, tmp_path / "a.html", key="lost")
    with pytest.raises(SaveError, match=r"The report .*a.html can't be written: No such file"):
        report(run, tmp_path / "nowhere" / "a.html")
    assert not (tmp_path / "a.html").exists()


@pytest.mark.long
def test_three_thousand_checkpoints_fit_on_a_page(tmp_path):
    """Of less than 5 MB, in a few seconds."""
    root = tmp_path / "run"
    for number in range(3000):
        folder = root / f"CKPT+2026-01-01+00-00-00+{number:04}"
        folder.mkdir(parents=True)
        meta = f"unixtime: {1.7e9 + number * 60}\nend-of-epoch: true\nstep: {number}\n"
        meta += f"train_loss: {1 / (number + 1)}\nval_loss: {2 / (number + 1)}\nacc: 0.123456789\n"
        (folder / "CKPT.yaml").write_text(meta)
        (folder / "model.ckpt").write_bytes(b"x" * 100)
    begin = time.process_time()
    path = report(root, tmp_path / "a.html")
    assert time.process_time() - begin < 8
    assert 1_000_000 < path.stat().st_size < 5_000_000
    assert len(read(path).table("name")) == 3000


def test_the_template_is_in_the_package():
    """Beside the modules that fill it, so that every build takes it along."""
    import lightning_sbckpt._views

    folder = Path(lightning_sbckpt._views.__file__).parent
    assert {"report.html.jinja", "report.js"} <= {file.name for file in folder.iterdir()}
