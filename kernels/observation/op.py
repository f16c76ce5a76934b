"""``mctf::observe``: leaves what an attached module computes in the graph, for the compiler to find."""

from torch import Tensor

from mctf_compile.kernels.library import composite


@composite("observe(Tensor(a) x, Tensor learned, str method, str state) -> Tensor(a)")
def observe(x: Tensor, learned: Tensor, method: str, state: str) -> Tensor:
    """``x`` itself. The compiler takes the operator out again; without it, nothing happens.

    Args:
        x: [B, N, C], what the module has read.
        learned: what it says of that: for a method [B, N, K], something of each token.
        method: the method, or the part of a reparametrisation, that it belongs to.
        state: "untrained", "training" or "trained".
    """
    return x
