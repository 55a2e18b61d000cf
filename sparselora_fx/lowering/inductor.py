"""What the lowerings use of Inductor, by name. Functions say which versions they ran on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import fx

from sparselora_fx.graph.layout import Size


class Value(Protocol):
    """What the lowerings ask a node of Inductor's IR."""

    def get_size(self) -> Sequence[Size]: ...
    def get_dtype(self) -> torch.dtype: ...
    def get_device(self) -> torch.device: ...
    def maybe_get_stride(self) -> Sequence[Size] | None: ...


@cache
def inductor() -> SimpleNamespace:
    """What the lowerings use of Inductor, by its own names; it costs seconds. Run on 2.13."""
    from torch._inductor import config, ir, lowering
    from torch._inductor.kernel.mm_common import acc_type
    from torch._inductor.select_algorithm import (
        ExternKernelChoice,
        SymbolicGridFn,
        TritonTemplate,
        autotune_select_algorithm,
        realize_inputs,
    )
    from torch._inductor.utils import use_triton_template
    from torch._inductor.virtualized import V

    return SimpleNamespace(
        config=config,
        lowerings=lowering.lowerings,
        register_lowering=lowering.register_lowering,
        FixedLayout=ir.FixedLayout,
        ExternKernelChoice=ExternKernelChoice,
        SymbolicGridFn=SymbolicGridFn,
        TritonTemplate=TritonTemplate,
        autotune_select_algorithm=autotune_select_algorithm,
        realize_inputs=realize_inputs,
        acc_type=acc_type,
        use_triton_template=use_triton_template,
        V=V,
    )


def select(
    name: str, choices: list[object], inputs: list[Value], layout: object, input_gen_fns: object
) -> Value:
    """The fastest of some choices, as an IR node. 2.12 and 2.13 return ``(node, choice)``."""
    found = inductor().autotune_select_algorithm(
        name, choices, inputs, layout, input_gen_fns=input_gen_fns
    )
    node: Value = found[0] if isinstance(found, tuple) else found
    return node


def only_choices(name: str) -> dict[str, object]:
    """Settings with which Inductor benchmarks matmuls, and only those choices whose names match a
    regular expression. Run on 2.13."""
    return {"max_autotune_gemm": True, "test_configs.autotune_choice_name_regex": name}


def fallback(op: torch._ops.OpOverload) -> Callable[..., Value]:
    """A lowering that calls an op's eager kernel, on inputs with the strides that were traced. Run
    on 2.13."""
    from torch._inductor.lowering import (
        add_layout_constraint,
        constrain_to_fx_strides,
        fallback_handler,
    )

    add_layout_constraint(op, constrain_to_fx_strides)
    return fallback_handler(op, add_to_fallback_set=False)  # type: ignore[no-any-return]


def sort_nodes(graph: fx.Graph) -> None:
    """Put each node after those that it reads, else as they were. Run on 2.13."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


def size_hint(expression: object) -> int:
    """A likely value of a size that may be symbolic. Run on 2.11, 2.12 and 2.13."""
    return int(inductor().V.graph.sizevars.optimization_hint(expression))


def always_equal(left: object, right: object) -> bool:
    """Whether two sizes are equal whatever their symbols stand for; adds no guard."""
    import sympy  # type: ignore[import-untyped]

    return bool(inductor().V.graph.sizevars.statically_known_true(sympy.Eq(left, right)))


def divides(divisor: int, size: Size) -> bool:
    """Whether a size is a multiple of ``divisor`` whatever its symbols stand for; adds no guard."""
    return always_equal(size % divisor, 0)
