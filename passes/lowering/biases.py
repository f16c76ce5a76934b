"""Pass: leave the bias of a projection to the next pointwise kernel, where a product copies it."""

from __future__ import annotations

import torch
from torch import fx

from mctf_compile.kernels.device import device_of
from mctf_compile.narrowing import present
from mctf_compile.passes.pipeline import State, graph_pass

aten = torch.ops.aten


@graph_pass("biases", requires=("lowered",))
def run(state: State) -> None:
    if state.config.lowering.inner == "inductor":
        loosen_biases(present(state.lowered))


def loosen_biases(gm: fx.GraphModule) -> None:
    """Add biases after their products where a copy would bring them in.

    On a CPU, ``addmm`` copies its bias over the whole result before the product, one more pass over
    memory; an addition of its own is fused by Inductor into the GELU, the residual add or the rearranging
    copy that follows. CUDA adds biases for free, and low precisions round once inside the product.

    Before::  y = aten.linear(x, weight, bias)
    After::   z = aten.linear(x, weight)
              y = aten.add.Tensor(z, bias)
    """
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        value = node.meta["val"]
        if len(node.args) < 3 or node.args[2] is None or value.dim() < 3:
            continue
        if not device_of(value.device).copies_biases or value.dtype is not torch.float32:
            continue
        bias = node.args[2]
        node.args = node.args[:2]
        with gm.graph.inserting_after(node):
            added = gm.graph.call_function(aten.add.Tensor, (node, bias))
        added.meta = dict(node.meta)
        node.replace_all_uses_with(added, delete_user_cb=lambda user, added=added: user is not added)
    gm.recompile()
