"""Coverage-guided fuzzing of the readers: `python tests/security/fuzz/run.py --minutes 3`.

Needs atheris (`pip install atheris`). Each reader gets its share of the time in a process of its
own. Exits with 0 if none did what it may not do, and with 1 otherwise; the bytes that made it do so
are then in the folder named.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MEMORY = Path("/dev/shm")


def fuzz_one(name: str, arguments: list[str]) -> None:
    """Fuzz one reader until libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["lightning_sbckpt", "yaml"]):
        from readers import READERS

    atheris.Setup([sys.argv[0], *arguments], READERS[name])
    atheris.Fuzz()


def fuzz_all(minutes: float, names: list[str]) -> int:
    """Fuzz every reader in turn; return how many did what they may not do."""
    from readers import SEEDS

    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    seconds = max(1, round(minutes * 60 / len(names)))
    faults = 0
    for name in names:
        corpus = work / name
        corpus.mkdir()
        for number, seed in enumerate(SEEDS):
            (corpus / f"seed{number}").write_bytes(seed)
        arguments = [
            f"-max_total_time={seconds}",
            "-timeout=20",
            "-rss_limit_mb=4096",
            "-max_len=8192",
            "-print_final_stats=1",
            f"-artifact_prefix={work}/{name}-",
            str(corpus),
        ]
        # In memory where there is such a place: thousands of files are written. The fuzzer ends its
        # process without clearing up, so that is done here.
        with tempfile.TemporaryDirectory(
            dir=MEMORY if os.access(MEMORY, os.W_OK) else None
        ) as aside:
            done = subprocess.run(
                [sys.executable, __file__, "--child", name, *arguments],
                env={**os.environ, "TMPDIR": aside},
                capture_output=True,
                text=True,
                check=False,
            )
        lines = done.stderr.splitlines()
        runs = next((line.split()[-1] for line in lines if "number_of_executed" in line), "?")
        covered = next((line for line in reversed(lines) if " cov: " in line), "").split()
        branches = covered[covered.index("cov:") + 1] if covered else "?"
        verdict = "ok" if done.returncode == 0 else f"FAULT, see {work}/{name}-*"
        print(f"{name:<12} {runs:>9} runs, {branches:>5} branches, {seconds} s: {verdict}")
        if done.returncode != 0:
            print("\n".join(lines[-40:]))
            faults += 1
    return faults


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["--child"]:
        fuzz_one(sys.argv[2], sys.argv[3:])
        return
    if importlib.util.find_spec("atheris") is None:
        sys.exit(
            "coverage-guided fuzzing needs atheris, which is not installed: pip install atheris"
        )
    from readers import READERS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="for all readers together")
    parser.add_argument("--reader", choices=sorted(READERS), action="append", help="only this one")
    options = parser.parse_args()
    sys.exit(1 if fuzz_all(options.minutes, options.reader or list(READERS)) else 0)


if __name__ == "__main__":
    main()
