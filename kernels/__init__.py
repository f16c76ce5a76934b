"""The operators ``torch.ops.mctf.*``: one room each, with a plain reference beside the fast form.

==================  ==============================================================================
``match``           which tokens leave, and into which (MCTF's multi-criteria bipartite matching)
``group``           the map, the pooling weights and the sizes that a matching gives
``pool``            combine each group of tokens into one
``unmerge``         give every token its group's value back
``attention``       attention over tokens that have sizes
``importance``      how much attention each token receives, before the values are computed
``ahead``           one-step-ahead attention: the pooled map times the values of the fused tokens
==================  ==============================================================================
"""

from mctf_compile.kernels.ahead import op as ahead
from mctf_compile.kernels.attention import op as attention
from mctf_compile.kernels.matching import op as matching
from mctf_compile.kernels.pooling import op as pooling
from mctf_compile.kernels.unmerge import op as unmerge

__all__ = ["ahead", "attention", "matching", "pooling", "unmerge"]
