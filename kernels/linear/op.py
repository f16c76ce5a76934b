"""``mctf::frozen_linear``: a linear layer whose weight nothing will change, on a CPU."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mctf_compile.kernels.device import device_of
from mctf_compile.kernels.library import LIBRARY, declare

# By weight, for as long as that lives: its elements in the order in which oneDNN reads them.
_packed = WeakTensorKeyDictionary()


def frozen_linear_supported(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this weight, in ``dtype``, on this machine."""
    available = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if not available or not device_of(weight.device).packs_weights:
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32


@declare("frozen_linear(Tensor x, Tensor weight, Tensor? bias, str? gelu) -> Tensor")
def _shapes(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None) -> Tensor:
    """X weight^T + bias, or its GELU, as one product of oneDNN.

    The weight is packed when it is first met, for as many rows as ``x`` has then, and is twice in memory from then on.
    BLAS packs it in every call, which takes as long as the product of some 20 rows.

    Args:
        x: [..., C], two dimensions or more, in the dtype of ``weight``.
        weight: [O, C]; the same tensor must have the same elements in every call.
        bias: [O], or None.
        gelu: "none" or "tanh", the approximation of ``aten::gelu``; None for no GELU.

    Returns:
        [..., O]. It has no gradient.
    """
    packed = _packed.get(weight)
    if packed is None:
        packed = _packed[weight] = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[:-1].numel())
    activation = "none" if gelu is None else "gelu"
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], gelu or "")
    return result


LIBRARY.impl("frozen_linear", frozen_linear, "CPU")
