"""`make fuzz`: every target for some seconds, a table of what was done, status 1 for any finding.

What a target found worth keeping is kept in .cache/fuzz/corpus, where the next run goes on; inputs that are findings
lie in .cache/fuzz/findings.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.fuzz.build import CannotBuild, build

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
KEPT = REPOSITORY / ".cache" / "fuzz"
NATIVE = ("lossless_decode", "lossless_round_trip", "lossy_decode", "lossy_round_trip")
PYTHON = ("container", "encode", "layout", "objects", "profile")
#: golden files that are inputs as they are
VECTORS = {"container": "tests/vectors/objects", "profile": "tests/vectors/profiles"}
INPUT_BYTES_MAX = 8192
#: an input that takes longer, or one allocation that is larger, is a finding
INPUT_S_MAX, ALLOCATION_MB_MAX, MEMORY_MB_MAX = 25, 256, 2048
TABLE_WIDTH = 100

_PROGRESS = re.compile(r"^#(\d+)\s.*?(?:cov: (\d+) )?(?:ft: (\d+) )?corp: (\d+)")
_KEPT = re.compile(r"Test unit written to (\S+)")
#: what tells most first
_REASONS = [
    re.compile(pattern)
    for pattern in (r"^FINDING: .*", r".*runtime error: .*", r"^\w*(Error|Exception)\b.*", r"^SUMMARY: .*")
]


@dataclass
class Report:
    target: str
    seconds: float = 0.0
    executions: int = 0
    edges: int = 0
    features: int = 0
    corpus: int = 0
    findings: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time (default: 1)")
    parser.add_argument("--core", type=Path, help="fuzz this copy of codec/native")
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"of {', '.join((*NATIVE, *PYTHON))}; default: all"
    )
    options = parser.parse_args(arguments)
    targets = options.targets or [*NATIVE, *PYTHON]
    unknown = sorted(set(targets) - {*NATIVE, *PYTHON})
    if unknown:
        return _fail(f"no target {', '.join(unknown)}: use one of {', '.join((*NATIVE, *PYTHON))}")
    if set(targets) & set(PYTHON) and importlib.util.find_spec("atheris") is None:
        return _fail("atheris is missing: pip install atheris, or name native targets only")
    programs = Path()
    if set(targets) & set(NATIVE):
        try:
            programs = build(options.core)
        except CannotBuild as problem:
            return _fail(str(problem))
    reports = _fuzz_all(targets, options.seconds, options.jobs, programs)
    _print(reports)
    return 1 if any(report.findings for report in reports) else 0


def _fail(line: str) -> int:
    print(f"fuzz: {line}", file=sys.stderr)
    return 2


def _fuzz_all(targets: Sequence[str], seconds: int, jobs: int, programs: Path) -> list[Report]:
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, transient=True) as progress, ThreadPoolExecutor(jobs) as pool:

        def one(target: str) -> Report:
            shown = progress.add_task(f"{target}, {seconds} s")
            try:
                return fuzz(target, seconds, programs)
            finally:
                progress.remove_task(shown)

        return list(pool.map(one, targets))


def fuzz(target: str, seconds: int, programs: Path) -> Report:
    """One target, from its seeds, its findings so far (one stays a finding until it is mended) and its kept corpus."""
    corpus, findings = KEPT / "corpus" / target, KEPT / "findings" / target
    seeds = [HERE / "seeds" / target, HERE / "crashes" / target, findings, REPOSITORY / VECTORS.get(target, "-")]
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    command = [str(programs / target)] if target in NATIVE else [sys.executable, "-m", "tests.fuzz.drive", target]
    report = Report(target)
    if target in NATIVE:
        _check_seeds(command, seeds[0], report)
    options = {
        "max_total_time": seconds, "max_len": INPUT_BYTES_MAX, "timeout": INPUT_S_MAX,
        "malloc_limit_mb": ALLOCATION_MB_MAX, "rss_limit_mb": MEMORY_MB_MAX, "artifact_prefix": f"{findings}/",
    }  # fmt: skip
    command += [str(corpus), *(str(folder) for folder in seeds if folder.is_dir())]
    started = time.monotonic()
    done = _run([*command, *(f"-{name}={value}" for name, value in options.items())])
    report.seconds = time.monotonic() - started
    lines = done.stderr.splitlines()
    for found in filter(None, map(_PROGRESS.match, lines)):
        report.executions, report.edges, report.features, report.corpus = (int(group or 0) for group in found.groups())
    if done.returncode:
        kept = _KEPT.search(done.stderr)
        report.findings.append(f"{Path(kept[1]).relative_to(REPOSITORY) if kept else 'no input kept'}: {_reason(done)}")
    return report


def _check_seeds(command: Sequence[str], seeds: Path, report: Report) -> None:
    """That the programs read the seeds as Python wrote them; else fuzzing would start from nothing."""
    valid = [str(path) for path in sorted(seeds.glob("valid*"))]
    done = _run([*command, *valid], KVSTORE_FUZZ_MUST_DECODE="1")
    if done.returncode:
        report.findings.append(f"a seed is not taken (`make fuzz-seeds`?): {_reason(done)}")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout + done.stderr).splitlines()  # Python's tracebacks are in the first, sanitizers' in the second
    for pattern in _REASONS:
        for line in lines:
            if pattern.match(line):
                return line.strip()
    return f"status {done.returncode}: {lines[-1] if lines else 'no output'}"


def _run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    sanitizers = {"UBSAN_OPTIONS": "print_stacktrace=1", **environment}
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **sanitizers},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def _print(reports: Sequence[Report]) -> None:
    table = Table(title="fuzzing")
    for name in ("target", "seconds", "executions", "a second", "edges", "features", "corpus", "findings"):
        table.add_column(name, justify="left" if name == "target" else "right")
    for report in reports:
        rate = report.executions / report.seconds if report.seconds else 0.0
        numbers = [f"{report.seconds:.0f}", f"{report.executions:,}", f"{rate:,.0f}"]
        numbers += [f"{value:,}" for value in (report.edges, report.features, report.corpus, len(report.findings))]
        table.add_row(report.target, *numbers)
    console = Console(width=max(TABLE_WIDTH, Console().width))  # into a pipe, too
    console.print(table)
    for report in reports:
        for finding in report.findings:
            console.print(f"{report.target}: {finding}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
