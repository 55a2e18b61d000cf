"""`expand_packed`: a product with a quantised weight becomes a linear on what it unpacks to."""

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from sparselora_fx.graph.nodes import tensor
from sparselora_fx.ir.ops import OPS
from sparselora_fx.ir.packed_ops import ALL
from sparselora_fx.model.unpacking import Layout
from sparselora_fx.passes.expand_packed import expand_packed
from sparselora_fx.rewrite.rewrite import Options, Program, TracedCall

LAYOUT = Layout("scaled", 6, 4, 4).encode()


def graph_of(dtype: torch.dtype) -> fx.GraphModule:
    graph = fx.Graph()
    with FakeTensorMode():
        values = torch.empty(3, 4, dtype=dtype), torch.empty(6, 4, dtype=torch.int8)
        values = (*values, torch.empty(6, 1), torch.empty(3, 6, dtype=dtype))
    x, packed, scales = (graph.placeholder(name) for name in ("x", "packed", "scales"))
    target = OPS.packed_linear.default
    made = graph.call_function(target, (x, packed, [scales], LAYOUT, None, ALL))
    for node, value in zip((x, packed, scales, made), values, strict=True):
        node.meta["example_value"] = value
    graph.output((made,))
    return fx.GraphModule({}, graph)


def test_a_product_is_a_linear_and_means_the_same() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        gm = graph_of(dtype)
        stored, scales = torch.randint(-128, 128, (6, 4)).to(torch.int8), torch.rand(6, 1)
        inputs = torch.randn(3, 4).to(dtype), stored, scales
        expected = gm(*inputs)[0]
        program = Program(gm, [], Options(), TracedCall())
        assert expand_packed(program) == 1
        assert expand_packed(program) == 0
        gm.graph.lint()
        gm.recompile()
        names = [node.target for node in gm.graph.nodes if node.op == "call_function"]
        assert names == [OPS.unpack.default, torch.nn.functional.linear]
        (matrix,) = gm.graph.find_nodes(op="call_function", target=OPS.unpack.default)
        value = tensor(matrix)
        assert value is not None and value.shape == (6, 4) and value.dtype == dtype
        torch.testing.assert_close(gm(*inputs)[0], expected)
