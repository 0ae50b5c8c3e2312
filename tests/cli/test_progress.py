"""Bars in a real terminal, for what takes longer than a second: there while it takes, and gone after it."""

from __future__ import annotations

import re
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from _python import python

from cli._terminal import ENVIRONMENT, terminals
from lightning_sbckpt import Checkpointer
from lightning_sbckpt._sharded.states import ShardedState
from lightning_sbckpt.cli import _bars
from lightning_sbckpt.cli._bars import Bars

# The command, in which each of the first steps that are told takes a while: the bar comes after a
# second, and has to move then.
SLOW = """
import sys, time
from lightning_sbckpt import verify
from lightning_sbckpt._io import progress

left = [None] * 7

def slow(told):
    def wait(*args):
        if left:
            left.pop()
            time.sleep(float(sys.argv[1]))
        return told(*args)
    return wait

progress.Tally._reach = slow(progress.Tally._reach)
verify._Tally.add = slow(verify._Tally.add)
from lightning_sbckpt.cli import _bars, main
assert _bars.Bars.__init__.__defaults__ == (1.0,)
_bars.Bars.__init__.__defaults__ = (float(sys.argv[2]),)
main(sys.argv[3:], prog_name="lightning-sbckpt")
"""
BAR = re.compile(r"(\w+ing) +[━╺╸]+ *[\d.,]+/[\d.,]+ (bytes|[kMG]B)")


def slowed(pause, patience=1.0):
    return "-c", SLOW, str(pause), str(patience)


@pytest.fixture
def in_pieces(tmp_path):
    """A checkpoint that ranks wrote in pieces."""
    state = ShardedState(torch.nn.Linear(3, 2).state_dict())
    with Checkpointer(tmp_path / "pieces", {"model": state}) as checkpointer:
        return checkpointer.save_checkpoint(name="p").path


@pytest.fixture
def terminal():
    """Start the command in a terminal."""
    with terminals() as start:
        yield start


@pytest.fixture
def commands(run, in_pieces, tmp_path):
    """Commands that take long, by the word that their bar has."""
    return {
        "averaging": ["average", run, "--newest", "2", "--name", "mean"],
        "exporting": ["export", run / "CKPT+e4", tmp_path / "out.pt"],
        "exporting tensors": ["export", run / "CKPT+e4", tmp_path / "out.safetensors"],
        "exporting all": ["export", run / "CKPT+e4", tmp_path / "out.ckpt"],
        "consolidating": ["consolidate", in_pieces],
        "verifying": ["verify", run],
        "verifying a report": ["report", run, "--verify", "-o", tmp_path / "report.html"],
        "removing": ["prune", run, "--keep", "Newest(1)", "--all-runs", "--yes"],
    }


COMMANDS = (
    "averaging",
    "exporting",
    "exporting tensors",
    "exporting all",
    "consolidating",
    "verifying",
    "verifying a report",
    "removing",
)


@pytest.mark.sample(1)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bar_shows_how_far_it_is_and_goes_away(command, commands, terminal):
    """With the word for what is done, and bytes; then the command prints what it always does."""
    screen = terminal(*commands[command], program=slowed(0.4), columns=200)
    assert screen.finish() == 0, screen.text
    words = {found.group(1) for found in BAR.finditer(screen.text)}
    assert words == {command.partition(" ")[0]}, screen.text
    assert len({found.group(0) for found in BAR.finditer(screen.text)}) > 1, "it does not move"
    # It was taken away, the cursor is back, and the answer is on lines of its own.
    assert screen.raw.rfind("\x1b[?25h") > screen.raw.rfind("\x1b[?25l") >= 0
    answer = screen.raw.rpartition("\x1b[?25h")[2]
    assert "━" not in answer
    assert answer.strip()


@pytest.mark.sample(1)
@pytest.mark.parametrize("command", ["averaging", "verifying"])
def test_with_json_there_is_none(command, commands, terminal):
    """Also where stderr is a terminal."""
    screen = terminal(*commands[command], "--json", program=slowed(0.4))
    assert screen.finish() == 0, screen.text
    assert "━" not in screen.text
    assert "\x1b" not in screen.raw


@pytest.mark.long
def test_there_is_none_where_stderr_is_no_terminal(commands):
    """A log file gets the words of the command, and nothing else."""
    done = python(*slowed(0.4), *commands["averaging"], env=ENVIRONMENT)
    done.check_returncode()
    assert "━" not in done.stdout
    assert not any(character in done.stderr for character in "━\x1b\r")


def test_there_is_none_for_what_is_done_in_time(commands, terminal):
    """Nothing flickers. (A busy machine takes its time for very little, so it has longer here.)"""
    screen = terminal(*commands["averaging"], program=slowed(0.0, patience=60.0))
    assert screen.finish() == 0, screen.text
    assert "━" not in screen.text
    assert "\x1b[?25l" not in screen.raw


def test_what_the_command_prints_is_all_on_stdout(commands, terminal, tmp_path):
    """A script takes it while a person watches the bar."""
    with (tmp_path / "out").open("w") as out:
        screen = terminal(*commands["averaging"], program=slowed(0.4), out=out)
        assert screen.finish() == 0
    assert "averaging" in screen.text
    assert (tmp_path / "out").read_text().endswith("/CKPT+mean\n")


def test_ctrl_c_leaves_the_terminal_as_it_was(commands, terminal):
    """No bar, no traceback, and the cursor is back."""
    screen = terminal(*commands["averaging"], program=slowed(2.0))
    screen.read_until(lambda text: "averaging" in text)
    screen.press("\x03")
    assert screen.finish() != 0
    assert "Traceback" not in screen.text
    assert screen.raw.rfind("\x1b[?25h") > screen.raw.rfind("\x1b[?25l")


@pytest.mark.sample(2)
@pytest.mark.parametrize("columns", [30, 60, 100])
def test_a_row_is_one_line_however_narrow_the_screen(columns, run, terminal):
    """The words are cut, the figures are not."""
    name = "a-name-that-is-much-longer-than-the-screen-is-wide-" * 2
    code = (
        "import time\n"
        "from lightning_sbckpt.cli._bars import Bars\n"
        f"with Bars(0).transfer('downloading [bold]{name}', 2000) as told:\n"
        "    told(1234); time.sleep(0.5)\n"
    )
    screen = terminal(program=("-c", code), columns=columns)
    assert screen.finish() == 0, screen.text
    lines = re.split(r"[\r\n]+", screen.text)
    assert any("1.2/2.0 kB" in line for line in lines), screen.text
    assert max(map(len, lines)) <= columns
    if columns == 100:
        assert "downloading [bold]a-name" in screen.text


class Clock:
    """Stands for time and for timers: it goes on when the test says so."""

    def __init__(self):
        self.now, self.timers = 100.0, []

    def monotonic(self):
        return self.now

    def timer(self, seconds, act):
        made = SimpleNamespace(due=self.now + seconds, act=act)
        made.start = partial(self.timers.append, made)
        made.cancel = partial(self.timers.remove, made)
        return made

    def go_on(self, seconds):
        self.now += seconds
        for each in self.timers:
            if each.due <= self.now:
                each.act()


def until(condition):
    """Return whether something comes true soon."""
    deadline = time.monotonic() + 60
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return true


class TestBars:
    """What is under way in one command."""

    @pytest.fixture(autouse=True)
    def _on_a_terminal(self, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")

    def test_what_tells_nothing_is_shown_too(self, capsys):
        """A store that does not answer: that is when one wants to know what is waited for."""
        bars = Bars(0.1)
        with bars.transfer("listing s3://bucket/run", None):
            assert until(lambda: bars._shown is not None)
        assert "listing s3://bucket/run" in capsys.readouterr().err

    def test_many_short_things_are_one_long_wait(self, capsys, monkeypatch):
        """It is what they take together that counts; what lies between them does not."""
        clock = Clock()
        monkeypatch.setattr(_bars, "time", clock)
        stands = SimpleNamespace(RLock=threading.RLock, Timer=clock.timer)
        monkeypatch.setattr(_bars, "threading", stands)
        bars = Bars(0.5)
        for _ in range(2):
            with bars.transfer("downloading CKPT+a", 10):
                clock.go_on(0.2)
            clock.go_on(0.5)
        assert capsys.readouterr().err == ""
        for name in "bc":
            with bars.transfer(f"downloading CKPT+{name}", 10):
                clock.go_on(0.3)
        assert "downloading CKPT+b" in capsys.readouterr().err

    def test_what_is_under_way_together_is_shown_together(self, capsys):
        """Its own work, and what it has to bring for that."""
        bars = Bars(0.0)
        both = re.compile(r"averaging.*1.0/4.0 kB.*\n.*downloading CKPT\+a.*2.0/5.0 kB")
        text = ""

        def is_shown():
            nonlocal text
            text += capsys.readouterr().err
            return both.search(text)

        with bars.work("averaging") as tell:
            tell(1000, 4000)
            with bars.transfer("downloading CKPT+a", 5000) as told:
                told(2000)
                assert until(is_shown), text

    def test_bytes_are_counted_whoever_tells_them(self):
        """By several threads, and taken back if they have to be sent again."""
        bars = Bars(100.0)
        with bars._row("uploading", 10**6) as row:
            pass
        with bars.transfer("uploading", 4000) as told:
            (row,) = bars._rows
            threads = [
                threading.Thread(target=lambda: [told(1) for _ in range(1000)]) for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert (row.done, row.total) == (4000, 4000)
            told(-1500)
            assert (row.done, row.total) == (2500, 4000)
            told(2000)
            assert (row.done, row.total) == (4500, 4500)

    def test_a_warning_meanwhile_is_a_line_above(self, terminal):
        """Not in the middle of the bar."""
        code = (
            "import time, logging\n"
            "from lightning_sbckpt.cli._bars import Bars\n"
            "from lightning_sbckpt.cli._common import log_to_terminal\n"
            "with log_to_terminal(), Bars(0).transfer('downloading', 2000) as told:\n"
            "    told(1000); time.sleep(0.3)\n"
            "    logging.getLogger('lightning_sbckpt').warning('the server is slow')\n"
            "    time.sleep(0.3)\n"
        )
        screen = terminal(program=("-c", code))
        assert screen.finish() == 0, screen.text
        lines = [line.strip() for line in re.split(r"[\r\n]+", screen.text)]
        assert "Warning: the server is slow" in lines
        assert lines.count("Warning: the server is slow") == 1

    def test_hushed_means_from_now_on(self, monkeypatch, capsys):
        """A command whose picture moves has no bars beside it."""
        bars = Bars(0.0)
        monkeypatch.setattr(_bars, "_current", lambda: bars)
        _bars.hush()
        with bars.transfer("downloading", 10):
            time.sleep(0.2)
        assert capsys.readouterr().err == ""
