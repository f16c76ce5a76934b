"""``python -m benchmarks``: measure a suite of workloads, and make the tables and plots of what was measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mctf_compile.cli.arguments import parse_names, positive
from mctf_compile.cli.console import FAILURE, INTERRUPTED, CommandError, report_error, stages


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="Time mctf against the dense model.")
    top.add_argument(
        "command",
        nargs="?",
        choices=("run", "report"),
        default="run",
        help="report: make the tables and plots of the results that are there (default: run)",
    )
    top.add_argument("--suite", choices=("cpu", "cuda", "quick"), default="cpu", help="default: cpu")
    top.add_argument("--rows", type=parse_names, metavar="NAME,...", help="rows of the suite (default: all)")
    top.add_argument("--rounds", type=positive, default=15, metavar="N", help="timed rounds (default: 15)")
    top.add_argument("--output", type=Path, metavar="DIR", help="folder of results (default: benchmarks/results)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        from benchmarks.suites import FOLDER

        folder = args.output or FOLDER
        return make_report(folder) if args.command == "report" else run(args.suite, args.rows, args.rounds, folder)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return report_error(error)


def run(suite: str, names: Sequence[str] | None, rounds: int, folder: Path) -> int:
    """Measure the rows of a suite; each is on disk before the next one begins."""
    import torch

    from benchmarks.suites import SUITES
    from mctf_compile.errors import MctfError
    from mctf_compile.measuring.results import append
    from mctf_compile.measuring.suite import measure_row

    known = {row.name: row for row in SUITES[suite]}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise CommandError(f"suite {suite} has no row {unknown[0]!r}; its rows are: {', '.join(known)}")
    if suite == "cuda" and not torch.cuda.is_available():
        raise CommandError("--suite cuda: no CUDA device is available")
    rows = [known[name] for name in names or known]
    finished, failed = 0, 0
    try:
        for i, row in enumerate(rows):
            try:
                with stages() as progress:
                    told = lambda what, *steps, name=row.name: progress(f"{name}: {what}", *steps)
                    result = measure_row(row, suite, rounds, told)
                path = append(result, folder)
            except MctfError as error:
                failed += 1
                print(f"{row.name} failed: {error}", file=sys.stderr)
                continue
            finished += 1
            measured = result.measured
            print(
                f"{row.name}: {measured['speedup_over_best_dense']:.2f}x over {measured['best_dense']}, "
                f"{measured['macs_ratio']:.2f}x fewer MACs ({i + 1}/{len(rows)}; {path.name})"
            )
    except KeyboardInterrupt:
        print(
            f"interrupted in {row.name}; the results of {finished} finished rows of {len(rows)} are in {folder}",
            file=sys.stderr,
        )
        return INTERRUPTED
    if finished:
        make_report(folder)
    return FAILURE if failed else 0


def make_report(folder: Path) -> int:
    """Write the page and the plots of all results in a folder."""
    from benchmarks.suites import SUITES
    from mctf_compile.measuring.page import write
    from mctf_compile.measuring.results import latest

    results = latest(folder) if folder.is_dir() else []
    if not results:
        raise CommandError(f"{folder} has no results; python -m benchmarks measures them")
    for path in write(results, folder, SUITES):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
