"""``mctf coverage``: what fuses in a zoo of models, whether every rewrite is sound, and which operators lack a rule."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from rich.table import Table

from mctf_compile.errors import cause_of
from mctf_compile.narrowing import present
from mctf_compile.testing.soundness import Soundness, check_rewrite
from mctf_compile.testing.unruled import unruled_operators
from mctf_compile.testing.zoo import Entry

# Enough to fuse in every scheduled block, few enough that duplicates suffice.
OPTIONS: dict[str, Any] = {"r": 0.15, "min_tokens": 4}


@dataclass(frozen=True)
class Surveyed:
    """What one model of the zoo did.

    ``error``: what it raised, else None. ``unruled``: its operators without a rule, and whether they read tokens;
    empty where nobody asked.
    """

    entry: Entry
    found: Soundness | None
    error: str | None
    seconds: float
    unruled: Mapping[str, bool] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def sound(self) -> bool:
        return self.found is not None and not self.found.problems

    def cells(self) -> list[str]:
        """The row of the table, as text."""
        name = [self.entry.kind, f"{self.entry.library} {self.entry.name}"]
        if self.found is None:
            return [*name, "", "", "", "", "", f"failed: {self.error}"]
        blocks = [b for report in self.found.reports for b in report.blocks]
        fused = [b for b in blocks if b.reason is None]
        tokens = f"{fused[0].tokens_in} → {fused[-1].tokens_out}" if fused else ""
        before = sum(r.macs_before for r in self.found.reports)
        after = sum(r.macs_after for r in self.found.reports)
        ratio = f"{before / after:.2f}" if fused else ""
        theorem = "" if not fused else "n/a" if self.found.duplicates is None else f"{self.found.duplicates:.0e}"
        return [*name, f"{len(fused)}/{len(blocks)}", tokens, ratio, f"{self.found.at_zero:g}", theorem, self.remarks()]

    def remarks(self) -> str:
        """What is wrong, else why blocks are dense, each reason with the number of its blocks."""
        found = present(self.found)
        if found.problems:
            return "UNSOUND: " + "; ".join(found.problems)
        blocks = [b for report in found.reports for b in report.blocks]
        if not blocks:
            return found.report.reason or ""
        reasons = Counter(b.reason for b in blocks if b.reason is not None)
        return "; ".join(f"{count} × {reason}" for reason, count in reasons.items())


PREFACE = """\
# What fuses in which model

Written by `mctf coverage -o passes/COVERAGE.md`: small or shallow models with random weights, position
information taken away, r = 0.15 of the tokens per block, all blocks but the first. The columns:

* the kind: A, token-wise operators and global attention; B, with side tensors that have the token axis; C, with
  operators on the grid in between; D, windows, convolutions and mixers throughout;
* blocks fused of those found, over all the graphs of a model (one whose state changes between calls is compiled
  twice); tokens into the first and out of the last block that fuses;
* the ratio of multiply-accumulates, dense to fused;
* the largest difference from the dense graph at r = 0;
* the largest relative error where only exact duplicates were fused ("n/a": other tokens were fused too, because
  padding, overlapping patches or fixed position tables tell equal patches apart).

"""

HEADINGS = ("", "model", "fused", "tokens", "MACs ratio", "r=0", "duplicates", "remarks")


def survey(entries: Iterable[Entry], operators: bool = False) -> Iterator[Surveyed]:
    """Rewrite and check each model; what one raises is its row's, and the others go on.

    ``operators``: whether to look for operators without a rule, which takes one more capture.
    """
    for entry in entries:
        start = time.perf_counter()
        found, error = None, None
        unruled: Mapping[str, bool] = MappingProxyType({})
        try:
            model, inputs = entry.make(), entry.inputs()
            with torch.no_grad():
                if operators:
                    unruled = unruled_operators(model, *inputs)
                found = check_rewrite(model, *inputs, **OPTIONS)
        except Exception as raised:
            cause = cause_of(raised)
            error = f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"[:300]
        torch._dynamo.reset()
        yield Surveyed(entry, found, error, time.perf_counter() - start, unruled)


def markdown(rows: Iterable[Surveyed]) -> str:
    """The rows as a Markdown page."""
    return PREFACE + _markdown_table(HEADINGS, (row.cells() for row in rows))


UNRULED = """\
# Operators without a rule

Written by `mctf coverage --operators passes/OPERATORS.md`: the operators without a rule that {models} models of
{libraries} consist of,
by the names that they have in ATen once Dynamo has captured them. Fused tokens are given back before such an operator.
"On tokens" are the models in which it reads values with a token axis of attention, or what another operator
without a rule has made of those; everywhere else its having no rule costs nothing. Those that read tokens come first.

"""

UNRULED_HEADINGS = ("operator", "models", "on tokens", "for example")


def operators_page(rows: Sequence[Surveyed]) -> str:
    """The operators without a rule of all the rows as a Markdown page."""
    models: dict[str, list[tuple[bool, str]]] = {}
    for row in rows:
        for operator, on_tokens in row.unruled.items():
            models.setdefault(operator, []).append((on_tokens, f"{row.entry.library} {row.entry.name}"))
    cells = []
    for operator, met in models.items():
        reading = [name for on_tokens, name in met if on_tokens]
        cells.append((f"`{operator}`", str(len(met)), str(len(reading)), (reading or [name for _, name in met])[0]))
    cells.sort(key=lambda row: (-int(row[2]), -int(row[1]), row[0]))
    libraries = ", ".join(sorted({row.entry.library for row in rows}))
    return UNRULED.format(models=len(rows), libraries=libraries) + _markdown_table(UNRULED_HEADINGS, cells)


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def table(rows: Iterable[Surveyed]) -> Table:
    """The rows as a rich table."""
    result = Table(title="coverage")
    for heading in HEADINGS:
        result.add_column(heading)
    for row in rows:
        result.add_row(*row.cells())
    return result
