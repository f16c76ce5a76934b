"""Operators over the channels of a token: linear, layer norm, embedding of patches."""

import torch

from mctf_compile.passes.rules.base import Call, Flow, rule

aten = torch.ops.aten


@rule(aten.linear)
def linear(call: Call) -> Flow:
    dims, weight = call.dims("input"), call.dims("weight")
    call.table.unify(dims[-1], weight[-1])
    # The axis of the output features is new at every use, even of a shared weight.
    return Flow((*dims[:-1], *(call.table.fresh(call.shape[-1], "c"),) * (len(weight) - 1)), (dims[-1],))


@rule(aten.layer_norm, aten.rms_norm)
def channel_norm(call: Call) -> Flow:
    dims = call.dims("input")
    return Flow(dims, dims[len(dims) - len(call.args["normalized_shape"]) :])


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def convolution(call: Call) -> Flow:
    """A convolution mixes channels and positions; only the batch stays."""
    dims = call.dims("input")
    new = call.table.fresh_dims(call.shape[1:], "x")
    return Flow((dims[0], *new), dims[1:])
