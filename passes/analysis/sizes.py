"""What the symbols in the sizes of a graph stand for: where its inputs have them, and their values at tracing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from mctf_compile.passes.axes import Size, hint_of, size_of


@dataclass(frozen=True)
class Sizes:
    """The symbols that sizes of a graph's inputs are.

    ``places``: by symbol, an input and the dimension of it that has this size; None for an input that is the number.
    ``hints``: their values for the inputs that the graph was captured with.
    """

    places: Mapping[sympy.Symbol, tuple[int, int | None]]
    hints: Mapping[sympy.Symbol, int]

    @classmethod
    def of(cls, inputs: Sequence[Any]) -> Sizes:
        """Those of the (fake) inputs of a graph."""
        places: dict[sympy.Symbol, tuple[int, int | None]] = {}
        hints: dict[sympy.Symbol, int] = {}
        for i, value in enumerate(inputs):
            numbers = enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]
            for d, number in numbers:
                if not isinstance(number, torch.SymInt) or number.node.hint is None:
                    continue
                symbol = size_of(number)
                if isinstance(symbol, sympy.Symbol) and symbol not in places:
                    places[symbol], hints[symbol] = (i, d), hint_of(number)
        return cls(places, hints)

    def known(self, size: Size) -> bool:
        """Whether the inputs' shapes alone tell what number a size is."""
        return isinstance(size, int) or size.free_symbols <= self.places.keys()

    def only(self, symbols: Collection[sympy.Symbol]) -> Sizes:
        """The same for some of the symbols alone."""
        places = {symbol: place for symbol, place in self.places.items() if symbol in symbols}
        return Sizes(places, {symbol: self.hints[symbol] for symbol in places})

    def read(self, inputs: Sequence[Any]) -> tuple[int, ...]:
        """The values of the symbols, in the order of ``places``, for inputs with data."""
        return tuple(inputs[i] if d is None else inputs[i].shape[d] for i, d in self.places.values())
