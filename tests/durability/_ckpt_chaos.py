"""An outside judge: ckpt-chaos ends a training at every file event and says what the next start did.

    python tests/durability/_ckpt_chaos.py                       all of it, into docs/durability.md: about 60 minutes
    python tests/durability/_ckpt_chaos.py --only loop,example   some rows, printed

`pip install ckpt-chaos speechbrain` first. It is run as its users run it, by its command; the trainings are in
`_chaos_jobs.py`, and `_chaos_sight.py` lets it see what it can't by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import ckpt_chaos
from ckpt_chaos.runner import rejudge

HERE = Path(__file__).resolve().parent
ROOT, HARNESS = HERE.parents[1], HERE.parent / "harness"
sys.path.append(str(HARNESS))

from _chaos_sight import MADE_UP  # noqa: E402
from _processes import context  # noqa: E402

PAGE = ROOT / "docs" / "durability.md"
BEGIN, END = "<!-- judge: begin -->", "<!-- judge: end -->"
VERDICTS = ("PASS", "LOST_WORK", "HARD_FAIL", "SILENT_DIVERGENCE")
KEPT = "{out}/run/*step=*"
"""Checkpoints by the names of their steps; all of them are kept."""
REPORTED = "{out}/../reported/step=*"
"""What the job was told is saved, whatever retention does to it later."""


# ---------------------------------------------------------------------- processes


def _run(arguments: list[str], environment: dict[str, str], printed: str) -> None:
    """In a new process that has torch loaded: run a job as a process of its own would."""
    os.environ.clear()
    os.environ.update(environment)
    log = os.open(printed, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    from _chaos_jobs import main
    from ckpt_chaos.targets.common import arm_from_env

    # As ckpt-chaos does it when Python starts.
    arm_from_env(int(environment.get("RANK", "0")), lazy=True)
    main(*arguments)


def _serve(connection: socket.socket, key: str) -> None:
    with connection, connection.makefile("r") as asked, tempfile.NamedTemporaryFile() as printed:
        job = json.loads(asked.readline())
        if not secrets.compare_digest(job["key"], key):
            return
        process = context.Process(
            target=_run, args=(job["arguments"], job["environment"], printed.name)
        )
        process.start()
        # Nothing more is sent: if there is something to read, it is that the command was killed.
        if connection in wait([connection, process.sentinel]):
            process.kill()
        process.join()
        with contextlib.suppress(OSError):
            connection.sendall(b"%d\n" % process.exitcode + Path(printed.name).read_bytes())


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Start processes for `_chaos_command.py`; give what it has to find in `CHAOS_SERVER`."""
    key = secrets.token_hex(16)
    # Torch is loaded here and now, not while ckpt-chaos waits for the first job.
    first = context.Process(target=int)
    first.start()
    first.join()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            with contextlib.suppress(OSError):  # It is closed in the end.
                while True:
                    connection = listening.accept()[0]
                    threading.Thread(target=_serve, args=(connection, key), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}:{key}"


# ---------------------------------------------------------------------- the judge


@dataclass(frozen=True)
class Judged:
    """What ckpt-chaos has found.

    Attributes:
        code: Its exit code.
        counts: How many ends of the process got each verdict.
        missed: How many processes did not end, or not at the event that was planned.
        events: How many file events it has seen in a run that nobody ended.
        printed: What it has printed.
    """

    code: int
    counts: Counter[str]
    missed: int
    events: int
    printed: str


def judge(
    job: str,
    work: Path,
    at: str,
    *,
    broken: str = "",
    contract: str = KEPT,
    modes: str = "before,torn",
    ranks: int = 1,
    victim: int = 0,
    temporary: str = "",
    points: int = 9999,
    jobs: int = 1,
) -> Judged:
    """Run ckpt-chaos on a job.

    Args:
        job: One of `_chaos_jobs.JOBS`.
        work: A new folder for all that is written.
        at: The server.
        broken: Which safety measure to take away, of `_chaos_jobs.BREAKS`.
        contract: Which checkpoints must not be lost once they are there, for `--checkpoint-glob`.
        modes: How the process ends.
        ranks: How many processes train together.
        victim: Which of them dies. File events are those of rank zero; another one dies when it gets there.
        temporary: The folder for temporary files.
        points: At how many events at most, spread evenly.
        jobs: How many at a time.
    """
    environment = {**os.environ, "CHAOS_SERVER": at, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, HERE, HARNESS)))
    command = [sys.executable, "-m", "ckpt_chaos", "run", "--work", str(work), "--modes", modes]
    command += ["--checkpoint-glob", contract, "--step-regex", r"resumed from step (\d+)"]
    # A time is written with more digits at one time than at another. By the names of its files alone
    # more counts as a checkpoint that must not be lost: one that is torn, too.
    command += ["--ckpt-ignore-size", "--result-file", "{out}/final.txt", "--timeout", "900"]
    command += ["--fail-on", "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL"]
    command += ["--max-points", str(points), "--jobs", str(jobs), "--ranks", str(ranks)]
    command += ["--", sys.executable, "-S", "-E", str(HERE / "_chaos_command.py"), job, "{out}"]
    command += [broken] if broken else []
    if temporary:
        environment["TMPDIR"] = temporary
    if victim:
        environment["CHAOS_VICTIM"] = str(victim)
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=HERE
    )
    rows = [row for row in rejudge(work) if not row.label.startswith("no crash")]
    printed = ended.stdout + ended.stderr
    assert rows, printed
    missed = sum(row.drift or not row.crashed for row in rows)
    found = re.search(r"(\d+) file events", printed)
    assert found, printed
    counts = Counter(row.verdict for row in rows)
    return Judged(ended.returncode, counts, missed, int(found[1]), printed)


# ---------------------------------------------------------------------- what it sees

_WRITES = ("write", "pwrite", "writev", "pwritev")
_CALLS = {
    "open": "open",
    "openat": "open",
    "creat": "open",
    "mkdir": "os.mkdir",
    "mkdirat": "os.mkdir",
    "rmdir": "os.rmdir",
    "unlink": "os.remove",
    "unlinkat": "os.remove",
    "rename": "os.rename",
    "renameat": "os.rename",
    "renameat2": "os.rename",
    "link": "os.link",
    "linkat": "os.link",
    "symlink": "os.symlink",
    "symlinkat": "os.symlink",
    "truncate": "truncate",
    "ftruncate": "truncate",
    "fallocate": "truncate",
    "write": "write",
    "pwrite64": "pwrite",
    "writev": "writev",
    "pwritev": "pwritev",
    "pwritev2": "pwritev",
    "sendfile": "write",
    "copy_file_range": "write",
}
_CALL = re.compile(r"(\w+)\((.*)\) += (\d+)")
_WAYS_TO_WRITE = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC")


def _operation(line: str, folder: str) -> tuple[str, str] | None:
    """Return what a line of strace says was done to something in a folder, if anything."""
    found = _CALL.match(line)
    if found is None or found[1] not in _CALLS or folder not in line:
        return None  # It failed, and changed nothing.
    call, arguments = found[1], found[2]
    kind = _CALLS[call]
    if kind == "open" and not _WAYS_TO_WRITE.search(arguments):
        return None
    if "AT_REMOVEDIR" in arguments:
        kind = "os.rmdir"
    if "RENAME_EXCHANGE" in arguments:
        kind = "exchange"
    by_descriptor = kind in (*_WRITES, "truncate") and call != "truncate"
    named = re.match(r"\d+<(.*?)>" if by_descriptor else r'.*?"(.*?)"', arguments)
    if named is None or (by_descriptor and folder not in named[1]):
        return None
    return kind, MADE_UP.sub("*", Path(named[1]).name)


def count(job: str, work: Path) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """Run a job under strace; return what the kernel did to its folder, and what of it ckpt-chaos missed."""
    work.mkdir(parents=True)
    out = work / "out"
    boot = Path(ckpt_chaos.__file__).parent / "_boot"
    environment = {
        **os.environ,
        "CKPT_CHAOS_WATCH": str(out),
        "CKPT_CHAOS_LOG": str(work / "events"),
        "CKPT_CHAOS_TORN_PYTHON": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (boot, ROOT))),
    }
    # A file for each thread, so that no line is cut in two by another's.
    command = [
        "strace",
        "-ff",
        "-y",
        "-qq",
        "--seccomp-bpf",
        "-s",
        "512",
        "-o",
        str(work / "trace"),
    ]
    command += ["-e", "trace=" + ",".join(f"?{call}" for call in _CALLS)]
    command += [sys.executable, str(HERE / "_chaos_jobs.py"), job, str(out)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    done: Counter[tuple[str, str]] = Counter()
    for trace in work.glob("trace.*"):
        for line in trace.read_text(errors="replace").splitlines():
            if operation := _operation(line, str(out)):
                done[operation] += 1
    seen: Counter[tuple[str, str]] = Counter()
    whole = set()
    for line in (work / "events.rank0").read_text().splitlines():
        _, kind, name, tornable = line.split("\t")
        seen[kind, name] += 1
        if tornable == "1" and kind not in _WRITES:
            whole.add(name)  # One event from opening to closing, which tears the file.
    missed = Counter({each: times - seen[each] for each, times in done.items()})
    return done, Counter(
        {
            (kind, name): times
            for (kind, name), times in missed.items()
            if times > 0 and not (name in whole and kind in (*_WRITES, "open"))
        }
    )


# ---------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """A row of the table: what is trained, and the arguments of `judge`."""

    what: str
    job: str
    how: dict[str, Any] = field(default_factory=dict)


_LOOP, _FIT = "plain loop, `Checkpointer`", "Lightning, `SBCheckpoint`"
_STOCK, _SPEECHBRAIN = "Lightning, `ModelCheckpoint`", "plain loop, SpeechBrain's `Checkpointer`"
_TWO = {"ranks": 2}
# Another rank than zero changes nothing in the folder that could be torn.
_ANOTHER = {"ranks": 2, "victim": 1, "modes": "before"}
ROWS = {
    "loop": Row(_LOOP, "loop"),
    "loop-async": Row(f"{_LOOP}, `async`", "loop-async"),
    "loop-prune": Row(
        f"{_LOOP}, keeps one, names used again", "loop-prune", {"contract": REPORTED}
    ),
    "fit": Row(_FIT, "fit"),
    "fit-async": Row(f"{_FIT}, `async`", "fit-async"),
    "fit-overlap": Row(f"{_FIT}, `overlap`", "fit-overlap"),
    "example": Row("`examples/preemptible/train.py`", "example", {"contract": REPORTED}),
    "loop-2": Row(f"{_LOOP}, two ranks, rank 0 dies", "loop", _TWO),
    "loop-2-other": Row(f"{_LOOP}, two ranks, rank 1 dies", "loop", _ANOTHER),
    "fit-2": Row(f"{_FIT}, two ranks, rank 0 dies", "fit", _TWO),
    "fit-2-other": Row(f"{_FIT}, two ranks, rank 1 dies", "fit", _ANOTHER),
    "unsynced": Row(f"{_LOOP}, what was not flushed is lost", "loop", {"modes": "unsynced"}),
    "fit-unsynced": Row(f"{_FIT}, what was not flushed is lost", "fit", {"modes": "unsynced"}),
    "stock": Row(_STOCK, "stock-lightning"),
    "stock-2": Row(f"{_STOCK}, two ranks, rank 0 dies", "stock-lightning", _TWO),
    "stock-tmp": Row(
        f"{_STOCK}, `$TMPDIR` on another filesystem", "stock-lightning", {"temporary": "/dev/shm"}
    ),
    "speechbrain": Row(_SPEECHBRAIN, "stock-speechbrain"),
    "speechbrain-2": Row(f"{_SPEECHBRAIN}, two ranks, rank 0 dies", "stock-speechbrain", _TWO),
    "no-flush": Row(
        "ours **without fsync**, what was not flushed is lost",
        "loop",
        {"modes": "unsynced", "broken": "no_flush", "points": 12},
    ),
    "prune-first": Row(
        "ours **removing the old before the new is there**",
        "loop-prune",
        {"contract": REPORTED, "broken": "prune_first", "points": 12},
    ),
}
HEAD = (
    "| training | file events | ends | passed | lost work | hard failure | diverged |",
    "|---|---|---|---|---|---|---|",
)


def line(row: Row, judged: Judged) -> str:
    """Return a line of the table."""
    counts = judged.counts
    cells = [row.what, judged.events, counts.total()]
    cells += [counts[verdict] for verdict in VERDICTS]
    return "| " + " | ".join(map(str, cells)) + " |"


def write(lines: dict[str, str]) -> None:
    """Put lines into the table, in place of those for the same training."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    for row in ROWS.values():
        (found,) = [each for each in old.splitlines() if each.startswith(f"| {row.what} |")] or [""]
        if found:
            lines.setdefault(row.what, found)
    table = [*HEAD, *(lines[row.what] for row in ROWS.values() if row.what in lines)]
    PAGE.write_text(before + BEGIN + "\n\n" + "\n".join(table) + "\n\n" + END + after)


def main() -> int:
    """Judge, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default=",".join(ROWS), help="some rows, by their names: " + ", ".join(ROWS)
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many processes at a time")
    parser.add_argument(
        "--points", type=int, default=9999, help="at most so many ends in a row, spread evenly"
    )
    parser.add_argument("--print", action="store_true", help="write nothing into the page")
    arguments = parser.parse_args()
    context.set_forkserver_preload(
        ["lightning.pytorch", "torch._dynamo", "omegaconf", "_chaos_jobs"]
    )
    failed = 0
    with server() as at, tempfile.TemporaryDirectory(prefix="ckpt-chaos-") as work:
        for name in arguments.only.split(","):
            row = ROWS[name]
            began = time.perf_counter()
            points = min(arguments.points, row.how.get("points", 9999))
            how = {**row.how, "points": points, "jobs": arguments.jobs}
            judged = judge(row.job, Path(work) / name, at, **how)
            print(judged.printed, line(row, judged), sep="\n")
            print(
                f"{name}: exit {judged.code}, {judged.missed} ended elsewhere, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
            is_ours = not row.job.startswith("stock") and "broken" not in row.how
            failed += is_ours and judged.code != 0
            if not arguments.print:
                write({row.what: line(row, judged)})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
