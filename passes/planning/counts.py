"""Token counts as inputs of a rewritten graph, so that one graph serves every ``r`` and its blocks are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import sympy
import torch
from torch import SymInt, Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from mctf_compile.compat import WatchedShapeEnv
from mctf_compile.errors import ConfigError
from mctf_compile.narrowing import present
from mctf_compile.passes.axes import hint_of


class Counts:
    """The inputs of a graph under a fake mode of its own, and a symbol for what each fusing block leaves.

    Every number of tokens is one symbol, not a sum over the blocks before it: symbolic shapes stay short, and
    blocks that do the same read the same.

    Attributes:
        inputs: fake tensors and sizes as given, their symbols replaced by new ones.
        remaining: per fusing block, the tokens that it leaves (protected ones included).
    """

    def __init__(self, inputs: Sequence[Any], remaining: Sequence[int]) -> None:
        self.env = WatchedShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self._of: dict[sympy.Symbol, SymInt] = {}
        self.inputs = [self._own(value) for value in inputs]
        self.remaining = [new_symbol(self.env, f"remaining_{i}", count) for i, count in enumerate(remaining)]

    def original(self, expression: sympy.Expr) -> sympy.Expr:
        """An expression of these symbols in those of the captured graph."""
        return expression.subs({new.node.expr: old for old, new in self._of.items()})

    def refuse_decisions(self, method: str) -> None:
        """Raise ``ConfigError`` where a method chose by the numbers themselves: its graph holds for no others."""
        if self.env.decisions:
            where = f"it decides by their number ({self.env.decisions[0]})"
        elif any(self.env.replace(size.node.expr).is_number for size in self.remaining):
            where = "an operator that it calls is compiled for one number of tokens"
        else:
            return
        raise ConfigError(
            f"method {method!r} cannot choose another number of tokens at another call: {where}. In choose, pass r "
            "on as it is (slices, topk and arange take it), or compile without dynamic_r, with an r that is no target."
        )

    def _own(self, value: Any) -> Any:
        if isinstance(value, SymInt):
            return self._translate(value)
        if not isinstance(value, Tensor):
            return value
        sizes, strides = ([self._translate(s) for s in of] for of in (value.shape, value.stride()))
        with self.mode:
            return torch.empty_strided(
                sizes, strides, dtype=value.dtype, device=value.device, requires_grad=value.requires_grad
            )

    def _translate(self, size: int | SymInt) -> int | SymInt:
        if not isinstance(size, SymInt):
            return size
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self._of:
                known = present(size.node.shape_env).create_symintnode(symbol, hint=None)
                self._of[symbol] = new_symbol(self.env, str(symbol), hint_of(known))
        replaced = {old: new.node.expr for old, new in self._of.items()}
        return self.env.create_symintnode(expression.subs(replaced), hint=hint_of(size))


def new_symbol(env: ShapeEnv, name: str, hint: int, small: bool = False) -> SymInt:
    """A size of its own in ``env``. ``small``: it may be 0 or 1 at another call, if not now."""
    source = ConstantSource(name)
    small = small or hint < 2
    symbol = env.create_symbol(
        hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None, do_not_specialize_zero_one=small
    )
    return cast(SymInt, env.create_symintnode(symbol, hint=hint, source=source))
