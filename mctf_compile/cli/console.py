"""What every command shares: exit statuses, errors in one line, and the progress that is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from mctf_compile.packages import MissingPackage

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
# Columns for what is printed to a file or a pipe.
WIDE = 140


class CommandError(Exception):
    """A mistake in the command line; the message is one line."""


class CheckFailed(Exception):
    """A check that the command made did not hold; the message is one line."""


def report_error(error: Exception) -> int:
    """One line on stderr for an error that is the user's to mend, and its exit status; raises others again."""
    from mctf_compile.errors import ConfigError, MctfError, cause_of

    cause = cause_of(error)
    if not isinstance(cause, (CommandError, CheckFailed, MctfError, MissingPackage)):
        raise error
    print(f"mctf: {cause}", file=sys.stderr)
    return USAGE_ERROR if isinstance(cause, (CommandError, ConfigError, MissingPackage)) else FAILURE


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Show what is under way, and for how long, on stderr; a line stays for each finished stage.

    Yields ``progress(what, done, total)``: another ``what`` begins another stage.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}{task.fields[steps]}"),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as display:
        current: list[str] = []

        def progress(what: str, done: int, total: int) -> None:
            if current[-1:] != [what]:
                finish()
                current.append(what)
                display.add_task(what, total=total, steps="")
                if not console.is_terminal:
                    console.print(f"{what} …", markup=False, highlight=False)
            display.update(TaskID(len(current) - 1), completed=done, steps=f" {done}/{total}" if total > 1 else "")

        def finish() -> None:
            if current:
                display.update(TaskID(len(current) - 1), completed=display.tasks[len(current) - 1].total)

        yield progress
        finish()


def wide_console() -> Console:
    """Where wide tables are printed: as wide as the terminal, and wide enough for them where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, WIDE))
