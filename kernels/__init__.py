"""The operators ``torch.ops.mctf.*``: one room each, with a plain reference beside the fast form.

===================== ============================================================================
``match``             which tokens leave, and into which (MCTF's multi-criteria bipartite matching)
``match_tiles``       the same, where one token in every tile of their grid receives others
``best``              the most similar partner of each token that may leave, a few at a time
``assign``            which tokens leave, from the scores of their pairs: one call where counts are inputs of a graph
``group``             the map, the pooling weights and the sizes that a matching gives
``pool``              combine each group of tokens into one
``keep``              the tokens that stay, the others dropped
``mlerp``             the factor that gives a mean the largest norm of its group
``observe``           what an attached module says of the tokens, for the compiler to find
``select``            which tokens have the highest scores
``nearest``           the unprotected kept token most similar to each dropped one
``unmerge``           give every token its group's value back
``attention``         attention over tokens that have sizes
``policy_attention``  attention in which a dropped token counts for itself alone (training)
``importance``        how much attention each token receives, before the values are computed
``ahead``             one-step-ahead attention: the pooled map times the values of the fused tokens
``powers``            weights that are powers of two, of a byte each
``binary_attention``  linear attention whose queries and keys are zeros and ones
``binary_importance`` how much of that attention each token receives
``neighbours``        a convolution of tokens on their grid, channel by channel
``routed_linear``     a linear layer with two weights, of which each token takes one
``frozen_linear``     a linear layer whose weight nothing will change, packed once (on a CPU)
===================== ============================================================================
"""

import mctf_compile.kernels.ahead.op
import mctf_compile.kernels.attention.op
import mctf_compile.kernels.binary.op
import mctf_compile.kernels.linear.op
import mctf_compile.kernels.matching.op
import mctf_compile.kernels.neighbours.op
import mctf_compile.kernels.observation.op
import mctf_compile.kernels.pooling.op
import mctf_compile.kernels.routed.op
import mctf_compile.kernels.selection.op
import mctf_compile.kernels.shift.op
import mctf_compile.kernels.unmerge.op  # noqa: F401
