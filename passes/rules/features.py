"""Operators over the channels of a token: linear, norms, convolutions."""

import torch

from mctf_compile.passes.axes import FEATURES
from mctf_compile.passes.rules.base import Call, Flow, rule, wrap

aten = torch.ops.aten


@rule(aten.linear)
def linear(call: Call) -> Flow:
    dims, weight = call.dims("input"), call.dims("weight")
    call.table.unify(dims[-1], weight[-1])
    # The axis of the output features is new at every use, even of a shared weight.
    features = (call.table.fresh(call.shape[-1], FEATURES),) * (len(weight) - 1)
    return Flow((*dims[:-1], *features), (dims[-1],))


@rule(aten.layer_norm, aten.rms_norm)
def channel_norm(call: Call) -> Flow:
    dims = call.dims("input")
    return Flow(dims, dims[len(dims) - len(call.args["normalized_shape"]) :])


@rule(aten.batch_norm)
def batch_norm(call: Call) -> Flow:
    """A scale and shift per channel; in training the statistics are those of all other positions."""
    dims = call.dims("input")
    return Flow(dims, (dims[0], *dims[2:]) if call.args["training"] else ())


@rule(aten.group_norm, aten.instance_norm)
def image_norm(call: Call) -> Flow:
    dims = call.dims("input")
    return Flow(dims, dims[1:])


@rule(aten.glu)
def glu(call: Call) -> Flow:
    dims = call.dims("self")
    d = wrap(call.args["dim"], len(dims))
    return Flow((*dims[:d], call.table.fresh(call.shape[d], FEATURES), *dims[d + 1 :]), (dims[d],))


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def convolution(call: Call) -> Flow:
    """A kernel of one position with stride 1 is a linear layer; any other mixes positions too."""
    dims, weight = call.dims("input"), call.args["weight"].meta["val"].shape
    features = call.table.fresh(call.shape[1], FEATURES)
    same = list(call.shape[2:]) == list(call.args["input"].meta["val"].shape[2:])
    if all(size == 1 for size in weight[2:]) and same:
        return Flow((dims[0], features, *dims[2:]), (dims[1],))
    return Flow((dims[0], features, *call.table.fresh_dims(call.shape[2:], "x")), dims[1:])


@rule(aten.embedding)
def embedding(call: Call) -> Flow:
    return Flow((*call.dims("indices"), call.table.fresh(call.shape[-1], FEATURES)))
