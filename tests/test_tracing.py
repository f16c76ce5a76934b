"""Tracing: the shapes that a traced program gives are those that it has when it runs."""

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mctf_compile.passes.analysis.normalize import fake_inputs, normalize
from mctf_compile.passes.tracing import trace

aten = torch.ops.aten
FORMS = {"function": F.linear, "packet": aten.linear, "overload": aten.linear.default}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6), (2, 3, 4, 6), (0, 4, 6)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float64, False),
        (torch.float32, True),
        (torch.float64, True),
        (torch.int32, True),
    ],
)
def test_a_traced_linear_promises_what_it_gives(form, bias, shape, dtype, autocast):
    operands = [torch.randn(of).to(dtype) for of in (shape, (5, 6), (5,))[: 2 + bias]]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in operands]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        gm = trace(lambda *args: form(*args), fake)
        actual = F.linear(*operands)
        (node,) = (n for n in gm.graph.nodes if n.op == "call_function")
        assert node.target is node.meta["original_aten"] is aten.linear.default
        assert "eager_input_vals" not in node.meta
        promised = node.meta["val"]
        assert (promised.shape, promised.stride(), promised.dtype) == (actual.shape, actual.stride(), actual.dtype)
        torch.testing.assert_close(gm(*operands), actual)


def test_transposed_tokens_give_a_contiguous_linear():
    x, weight = torch.randn(2, 6, 4), torch.randn(5, 6)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, weight)]
    gm = trace(lambda x, weight: F.linear(x.transpose(1, 2), weight), fake)
    (node,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert node.meta["val"].stride() == F.linear(x.transpose(1, 2), weight).stride()


def test_a_linear_of_other_channels_is_an_error():
    with FakeTensorMode():
        fake = [torch.empty(4, 6), torch.empty(5, 7)]
    with pytest.raises(RuntimeError, match="linear of"):
        trace(F.linear, fake)


def test_what_reads_an_attribute_several_times_reads_one_value():
    """As of an input: what its axes are is then known wherever it is read."""
    root = torch.nn.Module()
    root.register_buffer("table", torch.randn(4))
    graph = fx.Graph()
    x = graph.placeholder("x")
    for _ in range(3):
        x = graph.call_function(torch.add, (x, graph.get_attr("table")))
    graph.output((x,))
    given = torch.randn(2, 4)
    normal = normalize(fx.GraphModule(root, graph), fake_inputs(fx.GraphModule(root, graph), [given]))
    (table,) = normal.graph.find_nodes(op="get_attr")
    assert len(table.users) == 3
    torch.testing.assert_close(normal(given)[0], given + root.table + root.table + root.table)
