"""Keeping the autocast that a model is called under from a graph whose casts are operators."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from mctf_compile.passes.analysis.casts import autocast_of


def devices_of(nodes: Iterable[fx.Node]) -> set[str]:
    """The kinds of devices that the values of some nodes are on."""
    return {n.meta["val"].device.type for n in nodes if isinstance(n.meta.get("val"), Tensor)}


def keep_autocast_out(gm: fx.GraphModule, devices: Iterable[str]) -> None:
    """Make a graph turn autocast off while it runs, on those of ``devices`` where it is on at present.

    The graph does so itself: whatever compiles it knows that its caller is under autocast, and does for the backward
    pass what it does for every model that is.

    Before::  return aten.linear(aten.to(x, bfloat16), weight)
    After::   state = _enter_autocast("cpu", None, False, None)
              y = aten.linear(aten.to(x, bfloat16), weight)
              _exit_autocast(state)
              return y
    """
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    (output,) = gm.graph.find_nodes(op="output")
    state = autocast_of(devices)
    for device in state:
        with gm.graph.inserting_before(first):
            entered = gm.graph.call_function(_enter_autocast, (device, None, False, None))
        with gm.graph.inserting_before(output):
            output = gm.graph.call_function(_exit_autocast, (entered,))
    if state:
        gm.recompile()
