"""One rule per operator family: how it moves axes, how it runs on fused tokens, and what else the passes ask of it.

A new operator is a new entry here and nowhere else; an operator without one never gets fused tokens.

================  ====================================================================
``pointwise``     arithmetic, activations, casts, dropout
``layout``        reshape, permute, cat, slice, select, split, expand
``features``      linear, norms over channels, convolutions
``reductions``    mean, sum, max, softmax: weighted by the sizes over tokens
``contractions``  matmul, bmm, einsum
``attention``     scaled_dot_product_attention
``shiftadd``      the operators of ShiftAddViT: attention on binary queries and keys, layers with two weights
``bodies``        what tensor subclasses answer (quantised weights): by what it consists of
================  ====================================================================
"""

from mctf_compile.passes.rules import attention, contractions, features, layout, pointwise, reductions, shiftadd
from mctf_compile.passes.rules.base import RULES, Elements, Rule, find_rule, is_random, rule, sources
from mctf_compile.passes.rules.bodies import flow_of, rule_of
from mctf_compile.passes.rules.call import Call, Flow, Fused, schema_arguments

__all__ = [
    "RULES",
    "Call",
    "Elements",
    "Flow",
    "Fused",
    "Rule",
    "attention",
    "contractions",
    "features",
    "find_rule",
    "flow_of",
    "is_random",
    "layout",
    "pointwise",
    "reductions",
    "rule",
    "rule_of",
    "schema_arguments",
    "shiftadd",
    "sources",
]
