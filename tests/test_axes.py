"""The axis algebra: what a reshape, a concatenation and an alignment say about axes."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from mctf_compile import FusionConfig, rewrite
from mctf_compile.errors import PassError
from mctf_compile.passes.analysis.blocks import find_blocks
from mctf_compile.passes.analysis.token_axes import token_axes
from mctf_compile.passes.axes import AxisTable, Cat, Tokens, places, product
from mctf_compile.passes.rules import RULES
from mctf_compile.passes.rules.call import Flow
from mctf_compile.testing import TinyViT, VitSpec, assert_rewrite_sound


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


def test_products_are_identified_stretch_by_stretch():
    """[2·4] and [2·(2·2)]: heads of queries, and of keys that several of them share, each beside the images."""
    table = AxisTable()
    images, heads, others, keys, copies = table.fresh_dims((2, 4, 2, 2, 2))
    assert table.align(images + heads, others + keys + copies) == ()
    assert table.canonical(heads) == keys + copies and table.canonical(images) == table.canonical(others)
    # [6·2] and [4·3] have no boundary in common: what they are products of stays apart.
    six, two, four, three = table.fresh_dims((6, 2, 4, 3))
    assert table.align(six + two, four + three) == (six + two, four + three)
    assert table.canonical(six + two + four + three) == six + two + four + three


def test_equal_sizes_are_not_equal_axes():
    """Tokens and channels of the same number stay apart."""
    axes, nodes, _ = axes_of(lambda x, w: torch.nn.functional.linear(x, w), torch.ones(2, 48, 48), torch.ones(48, 48))
    _, tokens, channels = axes.of(nodes["linear"])
    assert tokens == axes.of(nodes["x_1"])[1] and channels != tokens


def test_a_concatenation_keeps_its_parts():
    table = AxisTable()
    (patches,) = table.fresh_dims((16,))
    joined = table.cat([(1, ()), (16, patches)])
    assert isinstance(joined[0], Cat) and product(joined) == 17
    assert table.slice(joined, 1, 17) == patches
    assert table.slice(joined, 0, 17) == joined
    assert table.slice(joined, 3, 17) is None


def test_nothing_but_features_is_cut_into_single_positions():
    """Images that are read one by one are still images: an operator over them meets another token in each."""
    table = AxisTable()
    images, features = table.fresh(2), table.fresh(2, "c")
    for axis in (images, features):
        table.cut(axis, [1])
    assert table.canonical(images) == images and isinstance(table.canonical(features)[0], Cat)


class OverImages(nn.Module):
    """The first image alone, and something over both, [N, B, C]."""

    def __init__(self, reduce):
        super().__init__()
        self.reduce, self.tokens = reduce, TinyViT(VitSpec(depth=2, head="dense"))

    def forward(self, images):
        x = self.tokens(images).transpose(0, 1)
        return x.select(1, 0), self.reduce(x)


@pytest.mark.parametrize("reduce", [lambda x: x.log_softmax(1), lambda x: x.cumsum(1), lambda x: x.amax(1)])
def test_images_of_which_one_is_read_alone_are_not_mixed_by_fused_tokens(reduce):
    torch.manual_seed(0)
    model = OverImages(reduce).eval()
    images = model.tokens.example(kinds=3, seed=1)
    options = {"r": 3, "min_tokens": 1, "tau_info": 0, "tau_size": 0, "layers": [0, 1]}
    assert images[0].shape[0] == 2
    report = assert_rewrite_sound(model, *images, duplicates=True, **options)
    assert report.fused and any("mixes the images of a batch" in line for line in report.unmerged)


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

    axes, _, graph = axes_of(Toy(), torch.ones(2, 9, 8))
    (block,) = find_blocks(graph, axes)
    assert (block.entry.name, block.middle.name, block.exit.name) == ("arg0_1", "add", "add_1")
    assert (block.tokens.size, block.tokens.lead, block.problem) == (9, 0, None)


def keys_first(q, k, v):
    return (k @ q.mT * q.shape[-1] ** -0.5).softmax(-2).mT @ v


def keys_first_in_an_einsum(q, k, v):
    logits = torch.einsum("bhqd,bhkd->bhkq", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhkq,bhkd->bhqd", logits.softmax(2), v)


def keys_named_first(q, k, v):
    return torch.einsum("bhkd,bhqd->bhqk", k, q * q.shape[-1] ** -0.5).softmax(-1) @ v


def turned_before_its_softmax(q, k, v):
    return ((k @ q.mT).permute(0, 1, 3, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def turned_twice(q, k, v):
    return ((q @ k.mT).mT * q.shape[-1] ** -0.5).softmax(-2).mT @ v


@pytest.mark.parametrize("options", [{"method": "tome"}, {"layers": [0, 1], "min_tokens": 1}], ids=str)
@pytest.mark.parametrize(
    "spelling",
    [keys_first, keys_first_in_an_einsum, keys_named_first, turned_before_its_softmax, turned_twice],
    ids=lambda f: f.__name__,
)
def test_keys_are_where_the_softmax_runs(spelling, options):
    """Methods that match by keys, or by the attention that tokens receive, choose as with one operator."""

    class Net(nn.Module):
        def __init__(self, attend):
            super().__init__()
            torch.manual_seed(0)
            self.attend = attend
            self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
            self.proj = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

        def forward(self, x):
            for qkv, proj in zip(self.qkv, self.proj):
                q, k, v = qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
                x = x + proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
            return x

    x, results = torch.randn(2, 24, 16, dtype=torch.float64), []
    for attend in (spelling, torch.nn.functional.scaled_dot_product_attention):
        with torch.no_grad():
            net = Net(attend).double().eval()
            gm = make_fx(net, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
            fused, report = rewrite(gm, [x], FusionConfig(r=4, kernels="aten", **options))
            results.append(fused(x))
        assert report.removed == 8
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: x.sort(stable=True)[0],
        lambda x: x.sort(dim=0)[1],
        lambda x: x.mode()[0],
        lambda x: x.cumsum(-1),
        lambda x: x.softmax(0),
        lambda x: x.argmax(-1),
        lambda x: x.sum(0),
        lambda x: x.amax(-1),
        lambda x: x.flip(0),
    ],
)
def test_a_value_without_dimensions_has_no_axes(operator):
    """PyTorch lets the first and the last dimension of such a value be named."""
    axes, _, graph = axes_of(lambda x: operator(x.sum()), torch.randn(2, 9, 4))
    made = [n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], torch.Tensor)]
    assert made and all(axes.of(n) == () for n in made)


@pytest.mark.parametrize("shapes", [((9, 4), (3, 7, 4)), ((3, 9, 4), (1, 7, 4)), ((1, 9, 4), (2, 3, 7, 4))], ids=str)
def test_attention_has_the_leading_axes_of_all_that_it_reads(shapes):
    """Queries, keys and values broadcast, and the result has the images and heads of whichever has them."""
    q, k = (torch.randn(shape) for shape in shapes)
    axes, nodes, _ = axes_of(torch.nn.functional.scaled_dot_product_attention, q, k, k.flip(-1))
    result = nodes["scaled_dot_product_attention"]
    (query, key), dims = (axes.of(node) for node in result.args[:2]), axes.of(result)
    assert [product(dim) for dim in dims] == list(result.meta["val"].shape)
    assert dims[:-2] == (key if len(key) > len(query) else query)[:-2] and dims[-2] == query[-2]


def test_a_shorter_index_gathers_first_positions_and_a_spread_one_all():
    x, index = torch.ones(2, 6, 4), torch.zeros(2, 1, 4, dtype=torch.long)
    axes, nodes, _ = axes_of(lambda x, i: (x.gather(2, i), torch.take_along_dim(x, i, 2)), x, index)
    tokens = axes.of(nodes["x_1"])[1]
    assert axes.of(nodes["gather"])[1] == () and tokens in axes.mixed_by(nodes["gather"])
    assert axes.of(nodes["take_along_dim"])[1] == tokens not in axes.mixed_by(nodes["take_along_dim"])


def test_a_rule_that_gives_wrong_sizes_is_an_error(monkeypatch):
    relu = torch.ops.aten.relu.default
    monkeypatch.setitem(RULES, relu, replace(RULES[relu], axes=lambda call: Flow((*call.dims("self")[:2], ()))))
    with pytest.raises(
        PassError, match=r"the rule of aten.relu.default gives sizes \[2, 6, 1\] to relu of \[2, 6, 4\]"
    ):
        axes_of(torch.relu, torch.ones(2, 6, 4))
