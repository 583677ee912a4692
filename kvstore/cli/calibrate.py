"""`kvstore calibrate`: progress while it runs, what the profile costs at the end, the same as JSON."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvstore.calibrate.options import KINDS, LOSSY_DTYPES, CalibrationFailed, Options
from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore.cli.render import print_json, print_table, size
from kvstore_codec import CodecError, ProfileKind

if TYPE_CHECKING:
    from kvstore.calibrate.run import Calibrated

NEEDS = ("torch", "transformers", "accelerate", "gguf")
INSTALL = "pip install 'llm-kvstore[demo]'"


def calibrate(options: Options, as_json: bool) -> None:
    """Raises CommandFailed where options contradict each other, something is missing, or the calibration fails."""
    _check(options)
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandFailed(f"calibration needs {', '.join(missing)}: {INSTALL}", ExitCode.USAGE)
    # transformers reads these when it is imported: no hub is asked, and there is one progress display
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    from kvstore.calibrate.run import run

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, highlight=False)) as display:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, steps: int) -> None:
            if stage not in tasks:
                tasks[stage] = display.add_task(stage, total=steps)
            display.update(tasks[stage], completed=done)

        try:
            found = run(options, progress)
        except (CalibrationFailed, CodecError) as error:
            raise CommandFailed(str(error)) from None
        except OSError as error:
            raise CommandFailed(f"{options.out}: the profile or its work cannot be written: {error.strerror}") from None
    report = _report(options, found)
    if as_json:
        print_json(report)
    else:
        _print(report)


def kind_of(name: str) -> ProfileKind:
    """Raises CommandFailed for a name that is none."""
    if name not in KINDS:
        raise CommandFailed(f"--kind {name}: use {', '.join(KINDS)}", ExitCode.USAGE)
    return KINDS[name]


def dtype_of(name: str) -> str:
    """Raises CommandFailed for a name that is none."""
    if name not in ("auto", *LOSSY_DTYPES):
        raise CommandFailed(f"--dtype {name}: use auto, {', '.join(LOSSY_DTYPES)}", ExitCode.USAGE)
    return name


def _check(options: Options) -> None:
    if options.out.is_dir() or not options.out.absolute().parent.is_dir():
        raise CommandFailed(f"--out {options.out}: pass a file's name in a folder that exists", ExitCode.USAGE)
    if not 0 < options.target_kl < math.inf:
        raise CommandFailed("--target-kl must be positive: nats a token at medium, such as 1e-3", ExitCode.USAGE)
    if options.kind is ProfileKind.STATISTICS and (
        options.split_kv or options.layers_per_group != 1 or not options.gradients
    ):
        raise CommandFailed(
            "--kind statistics takes no --layers-per-group, --split-kv or --no-gradients: it has no channels' loss",
            ExitCode.USAGE,
        )


def _report(options: Options, found: Calibrated) -> dict[str, Any]:
    profile = found.profile
    return {
        "out": str(options.out),
        "profile_id": profile.profile_id.hex(),
        "bytes": len(profile.to_bytes()),
        "groups": len(profile.groups),
        "channels": sum(group.channels for group in profile.groups),
        "components": sum(group.components for group in profile.groups),
        "metadata": profile.metadata,
        "seconds": {stage: round(seconds, 1) for stage, seconds in found.seconds.items()},
    }


def _print(report: dict[str, Any]) -> None:
    metadata = report["metadata"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("quality", no_wrap=True)
    for heading in ("KL, nats", "bits/elt"):
        table.add_column(heading, justify="right", no_wrap=True)
    for quality, bits in sorted(metadata["bits_per_element"].items(), key=lambda row: float(row[1])):
        table.add_row(quality, f"{metadata['kl'][quality]:.2e}", f"{bits:.3f}")
    print_table(table)
    print(
        f"{report['out']}: {metadata['kind']} profile of {metadata['model']}, {size(report['bytes'])}, "
        f"{report['components']} components of {report['channels']} channels in {report['groups']} groups\n"
        f"id {report['profile_id']}\n"
        f"{sum(report['seconds'].values()):.0f} s; KL and bits are of held-out windows, the last "
        f"{metadata['probe']['exact_tail_tokens']} of {metadata['probe']['prefix_tokens']} tokens kept exact"
    )
