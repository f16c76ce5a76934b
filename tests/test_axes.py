"""The axis algebra: what a reshape, a concatenation and an alignment say about axes."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from mctf_compile.passes.analysis.blocks import find_blocks
from mctf_compile.passes.analysis.token_axes import token_axes
from mctf_compile.passes.axes import AxisTable, Cat, Tokens, places, product


def axes_of(function, *inputs):
    graph = make_fx(function, pre_dispatch=True)(*inputs).graph
    nodes = {n.name: n for n in graph.nodes}
    return token_axes(graph), nodes, graph


def test_a_reshape_splits_and_joins_back():
    table = AxisTable()
    (batch, tokens, channels) = table.fresh_dims((2, 9, 12))
    split, cut = table.reshape((batch, tokens, channels), (2, 9, 3, 4))
    assert cut == () and split[:2] == (batch, tokens)
    joined, _ = table.reshape(split, (2, 9, 12))
    assert joined == table.canonical_dims((batch, tokens, channels))


def test_a_reshape_through_an_axis_is_not_taken_for_it():
    """[9, 16] -> [16, 9]: the numbers fit crosswise, the positions do not."""
    table = AxisTable()
    dims = table.fresh_dims((2, 9, 16))
    new, cut = table.reshape(dims, (2, 16, 9))
    assert new[0] == dims[0] and cut == dims[1:]
    assert not set(new[1] + new[2]) & set(dims[1] + dims[2])


def test_equal_sizes_are_not_equal_axes():
    """Tokens and channels of the same number stay apart."""
    axes, nodes, _ = axes_of(lambda x, w: torch.nn.functional.linear(x, w), torch.ones(2, 48, 48), torch.ones(48, 48))
    batch, tokens, channels = axes.of(nodes["linear"])
    assert tokens == axes.of(nodes["x_1"])[1] and channels != tokens


def test_a_concatenation_keeps_its_parts():
    table = AxisTable()
    (patches,) = table.fresh_dims((16,))
    joined = table.cat([(1, ()), (16, patches)])
    assert isinstance(joined[0], Cat) and product(joined) == 17
    assert table.slice(joined, 1, 17) == patches
    assert table.slice(joined, 0, 17) == joined
    assert table.slice(joined, 3, 17) is None


def test_a_side_tensor_gets_the_axis_it_is_added_to():
    axes, nodes, _ = axes_of(lambda x, p: x + p, torch.ones(2, 9, 4), torch.ones(1, 9, 4))
    assert axes.of(nodes["p_1"])[1] == axes.of(nodes["x_1"])[1]


def test_tokens_in_a_grid_have_a_place_of_several_dimensions():
    table = AxisTable()
    batch, rows, columns, channels = table.fresh_dims((2, 4, 4, 8))
    flat, _ = table.reshape((batch, rows, columns, channels), (2, 16, 8))
    tokens = Tokens(flat[1], 16, 0, 0, flat[0])
    assert [(p.dim, p.rest) for p in places(flat, tokens)] == [(1, ())]
    assert [(p.dim, p.rest) for p in places((batch, rows, columns, channels), tokens)] == [(1, (2,))]
    assert [(p.dim, p.rest) for p in places((batch, channels, rows, columns), tokens)] == [(2, (3,))]


def test_a_transposed_or_partial_grid_is_no_place():
    table = AxisTable()
    batch, rows, columns, channels = table.fresh_dims((2, 4, 4, 8))
    flat, _ = table.reshape((batch, rows, columns, channels), (2, 16, 8))
    tokens = Tokens(flat[1], 16, 0, 0, flat[0])
    assert places((batch, columns, rows, channels), tokens) is None
    assert places((batch, rows, channels), tokens) is None
    assert places((batch, rows + channels, columns), tokens) is None


@pytest.mark.parametrize("head_first", [True, False])
def test_an_unknown_operator_gives_fresh_axes(head_first):
    """Default-deny: nothing is known of the result of an operator without a rule."""
    def program(x):
        return x.cumsum(1).sort(1).values if head_first else torch.fft.fft(x).real

    axes, nodes, graph = axes_of(program, torch.ones(2, 9, 4))
    result = next(iter(graph.nodes)).users
    assert result
    if not head_first:
        tokens = set(axes.of(nodes["x_1"])[1])
        assert all(not tokens & set(d) for n in graph.nodes if "fft" in n.name for d in axes.of(n))


def test_blocks_are_found_in_order_with_their_residual_streams():
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.fc = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(2, 9, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 8)
            return y + self.fc(y)

    axes, nodes, graph = axes_of(Toy(), torch.ones(2, 9, 8))
    (block,) = find_blocks(graph, axes)
    assert (block.entry.name, block.middle.name, block.exit.name) == ("arg0_1", "add", "add_1")
    assert (block.tokens.size, block.tokens.lead, block.problem) == (9, 0, None)
