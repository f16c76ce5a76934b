"""One rule per operator family: how it moves axes, and how it runs on fused tokens.

A new operator is a new entry here and nowhere else; an operator without one never gets fused tokens.

================  ====================================================================
``pointwise``     arithmetic, activations, casts, dropout
``layout``        reshape, permute, cat, slice, select, split, expand
``features``      linear, norms over channels, convolutions
``reductions``    mean, sum, max, softmax: weighted by the sizes over tokens
``contractions``  matmul, bmm, einsum
``attention``     scaled_dot_product_attention
``bodies``        what tensor subclasses answer (quantised weights): by what it consists of
================  ====================================================================
"""

from mctf_compile.passes.rules import attention, contractions, features, layout, pointwise, reductions
from mctf_compile.passes.rules.base import (
    RULES,
    Call,
    Flow,
    Rule,
    find_rule,
    is_random,
    rule,
    schema_arguments,
    sources,
)
from mctf_compile.passes.rules.bodies import flow_of, rule_of

__all__ = [
    "RULES",
    "Call",
    "Flow",
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
    "sources",
]
