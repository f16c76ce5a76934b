"""Operators over the channels of a token: linear, norms, convolutions."""

from typing import cast

import torch

from mctf_compile.narrowing import operator_of
from mctf_compile.passes.axes import FEATURES, Dims
from mctf_compile.passes.rules.base import rule, wrap
from mctf_compile.passes.rules.call import Arguments, Call, Flow
from mctf_compile.passes.rules.pointwise import aligned, broadcast

aten = torch.ops.aten


@rule("linear", reads="input weight bias", called="a linear layer over the tokens", layer=True, channels=-1)
def linear(call: Call) -> Flow:
    dims, weight = call.dims("input"), call.dims("weight")
    call.table.unify(dims[-1], weight[-1])
    # The axis of the output features is new at every use, even of a shared weight.
    features = (call.table.fresh(call.shape[-1], FEATURES),) * (len(weight) - 1)
    return Flow((*dims[:-1], *features), (dims[-1],))


@rule("bilinear", reads="input1 input2 weight bias", layer=True)
def bilinear(call: Call) -> Flow:
    """A product of two vectors for each feature."""
    one, other = call.dims("input1"), call.dims("input2")
    mixed = tuple(dim for a, b in zip(one[:-1], other[:-1]) for dim in call.table.align(a, b))
    lead = tuple(a or b for a, b in zip(one[:-1], other[:-1]))
    return Flow((*lead, call.table.fresh(call.shape[-1], FEATURES)), (*mixed, one[-1], other[-1]))


@rule("layer_norm", "rms_norm", reads="input normalized_shape weight bias eps cudnn_enable", passing=True)
def channel_norm(call: Call) -> Flow:
    dims = call.dims("input")
    return Flow(dims, dims[len(dims) - len(call.args["normalized_shape"]) :])


@rule("native_layer_norm", reads="input normalized_shape weight bias eps")
def channel_norm_and_statistics(call: Call) -> Flow:
    """The norm as it is below autograd: beside it, the mean and the deviation of each position."""
    dims = call.dims("input")
    kept = len(dims) - len(call.args["normalized_shape"])
    statistics = dims[:kept] + ((),) * (len(dims) - kept)
    return Flow([dims, statistics, statistics], dims[kept:])


@rule(
    "batch_norm",
    reads="input weight bias running_mean running_var training momentum eps cudnn_enabled",
    passing=True,
)
def batch_norm(call: Call) -> Flow:
    """A scale and shift per channel; in training the statistics are those of all other positions."""
    dims = call.dims("input")
    return Flow(dims, dims if call.args["training"] else dims[1:2])


@rule(
    "group_norm",
    "instance_norm",
    reads="input num_groups weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled",
    passing=True,
)
def image_norm(call: Call) -> Flow:
    dims = call.dims("input")
    return Flow(dims, dims[1:])


@rule("prelu", reads="self weight")
def prelu(call: Call) -> Flow:
    """A slope for each position of the second dimension, or one for all."""
    dims = call.dims("self")
    return Flow(dims, dims[1:2] if call.args["weight"].meta["val"].numel() > 1 else ())


@rule("glu", reads="self dim")
def glu(call: Call) -> Flow:
    dims = call.dims("self")
    d = wrap(call.args["dim"], len(dims))
    return Flow((*dims[:d], call.table.fresh(call.shape[d], FEATURES), *dims[d + 1 :]), (dims[d],))


def with_its_kernel(arguments: Arguments) -> str:
    """A convolution by the shape of its kernel."""
    kernel = arguments["weight"].meta["val"].shape[2:]
    return f"a {'×'.join(str(k) for k in kernel)} convolution"


@rule(
    "conv1d",
    "conv1d.padding",
    "conv2d",
    "conv2d.padding",
    "conv3d",
    "conv3d.padding",
    "convolution",
    reads="input weight bias stride padding dilation groups transposed output_padding",
    called=with_its_kernel,
    layer=True,
    channels=1,
)
def convolution(call: Call) -> Flow:
    """A kernel of one position with stride 1 is a linear layer; any other mixes positions too."""
    dims, kernel = call.dims("input"), call.args["weight"].meta["val"].shape[2:]
    # Images may be given one at a time, without a dimension that numbers them.
    c = len(dims) - len(kernel) - 1
    features = call.table.fresh(call.shape[c], FEATURES)
    padding = call.args["padding"]
    in_place = isinstance(padding, str) or not any((*padding, *call.args.get("output_padding", ())))
    if in_place and all(size == 1 for size in (*kernel, *call.args["stride"])):
        return Flow((*dims[:c], features, *dims[c + 1 :]), (dims[c],))
    return Flow((*dims[:c], features, *call.table.fresh_dims(call.shape[c + 1 :], "x")), dims[c:])


@rule(
    *(f"{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3)),
    reads="self kernel_size stride padding dilation ceil_mode count_include_pad divisor_override",
)
@rule(
    *(f"upsample_{kind}.vec" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "trilinear3d")),
    *(f"{aa}.vec" for kind in ("bilinear2d", "bicubic2d") for aa in (f"upsample_{kind}", f"_upsample_{kind}_aa")),
    reads="input output_size scale_factors align_corners",
)
def resampled(call: Call) -> Flow:
    """The positions of a grid are made of neighbours: as many dimensions as the operator's name says."""
    dims, name = call.dims_of(call.tensors()[0]), operator_of(call.node).overloadpacket.__name__
    kept = len(dims) - next(int(c) for c in name if c.isdigit())
    return Flow((*dims[:kept], *call.table.fresh_dims(call.shape[kept:], "x")), dims[kept:])


@rule("cosine_similarity", "pairwise_distance", reads="x1 x2 dim eps p keepdim", broadcasts=True)
def compared(call: Call) -> Flow:
    """One number for two vectors: of the last dimension, or of the one that is named."""
    rank = max(len(call.dims(name)) for name in ("x1", "x2"))
    met = broadcast(call, rank)
    d = wrap(call.args.get("dim", -1), rank)
    keep = call.args.get("keepdim", False)
    dims = cast(Dims, met.out)
    out = tuple(() if i == d else dim for i, dim in enumerate(dims) if keep or i != d)
    return Flow(out, (*met.mixed, dims[d]))


@rule("cdist", reads="x1 x2 p compute_mode")
def distances(call: Call) -> Flow:
    """From each vector of one to each of the other."""
    x, y = call.dims("x1"), call.dims("x2")
    met = aligned(call, [x[:-2], y[:-2]], len(call.shape) - 2)
    vectors = call.table.align(x[-1], y[-1])
    return Flow((*cast(Dims, met.out), x[-2], y[-2]), (*met.mixed, *vectors, x[-1], y[-1]))


@rule("embedding", reads="weight indices padding_idx scale_grad_by_freq sparse")
def embedding(call: Call) -> Flow:
    return Flow((*call.dims("indices"), call.table.fresh(call.shape[-1], FEATURES)))
