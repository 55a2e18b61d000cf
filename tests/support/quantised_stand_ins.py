"""Stand-ins for linears as quantisers make them that are not installed here: classes of their names
that keep tensors of their names, dtypes and shapes."""

from typing import Any

import torch
from torch import Tensor, nn

WIDTH, CHANNELS = 16, 40


def named(kind: type, module: str) -> type:
    """A stand-in: a class that says it comes from this module."""
    kind.__module__ = module
    return kind


class Wrapped(Tensor):
    """A tensor subclass that keeps its values in another form."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "Wrapped":
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)  # type: ignore[attr-defined, no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"the raw error of {func}")


def bitsandbytes_4bit(linear: nn.Linear) -> nn.Module:
    parameter = named(type("Params4bit", (nn.Parameter,), {}), "bitsandbytes.nn.modules")
    kind = named(type("Linear4bit", (nn.Linear,), {}), "bitsandbytes.nn.modules")
    packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
    new = kind(linear.in_features, linear.out_features)
    new.weight = parameter(packed, requires_grad=False)
    return new


def bitsandbytes_8bit(linear: nn.Linear) -> nn.Module:
    parameter = named(type("Int8Params", (nn.Parameter,), {}), "bitsandbytes.nn.modules")
    kind = named(type("Linear8bitLt", (nn.Linear,), {}), "bitsandbytes.nn.modules")
    new = kind(linear.in_features, linear.out_features)
    new.weight = parameter(linear.weight.to(torch.int8), requires_grad=False)
    return new


def torchao_tensor(linear: nn.Linear) -> nn.Module:
    kind = named(type("Int8Tensor", (Wrapped,), {}), "torchao.quantization")
    linear.weight = nn.Parameter(kind(linear.weight.detach()), requires_grad=False)
    return linear


def gptq(linear: nn.Linear) -> nn.Module:
    new = named(type("TorchQuantLinear", (nn.Module,), {}), "gptqmodel.nn_modules.qlinear.torch")()
    new.register_buffer("qweight", torch.zeros(WIDTH // 8, CHANNELS, dtype=torch.int32))
    new.register_buffer("scales", torch.ones(1, CHANNELS))
    return new


def awq(linear: nn.Linear) -> nn.Module:
    new = named(type("WQLinear_GEMM", (nn.Module,), {}), "awq.modules.linear.gemm")()
    new.register_buffer("qweight", torch.zeros(WIDTH, CHANNELS // 8, dtype=torch.int32))
    return new


def compressed(linear: nn.Linear) -> nn.Module:
    linear.weight_packed = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)
    linear.quantization_scheme = object()  # type: ignore[assignment]
    del linear.weight
    return linear


def fp8(linear: nn.Linear) -> nn.Module:
    kind = named(type("FP8Linear", (nn.Linear,), {}), "transformers.integrations.finegrained_fp8")
    new = kind(linear.in_features, linear.out_features)
    new.weight = nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    new.weight_scale_inv = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    return new


def decompressed(linear: nn.Linear) -> nn.Module:
    """compressed-tensors after its first call: the weight is plain, the forward is not."""
    linear.quantization_scheme = object()  # type: ignore[assignment]
    linear.weight_scale = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    return linear


def quanto(linear: nn.Linear) -> nn.Module:
    kind = named(type("WeightQBytesTensor", (Wrapped,), {}), "optimum.quanto.tensor.weights")
    linear.weight = nn.Parameter(kind(linear.weight.detach()), requires_grad=False)
    return linear


def holding(name: str, module: str, *, of_linear: bool = True, **held: Tensor) -> Any:
    """Makes stand-ins of a class that keeps these tensors: parameters if they are frozen ones."""

    def change(linear: nn.Linear) -> nn.Module:
        new = named(type(name, (nn.Module,), {}), module)()
        if of_linear:
            new.in_features, new.out_features = linear.in_features, linear.out_features
        for key, value in held.items():
            if isinstance(value, nn.Parameter):
                new.register_parameter(key, value)
            else:
                new.register_buffer(key, value)
        return new

    return change


def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)


BYTES, WORDS, HALF = torch.uint8, torch.int32, torch.float16
QUANTISED = [
    (bitsandbytes_4bit, "bitsandbytes"),
    (bitsandbytes_8bit, "bitsandbytes"),
    (torchao_tensor, "torchao"),
    (gptq, "gptqmodel"),
    (awq, "awq"),
    (compressed, "compressed-tensors"),
    (fp8, "FP8Linear"),
    (decompressed, "compressed-tensors"),
    (quanto, "optimum (WeightQBytesTensor)"),
    (holding("HQQLinear", "hqq.core.quantize", W_q=frozen(8, 4, dtype=BYTES)), "hqq"),
    (holding("EetqLinear", "eetq", weight=frozen(16, 40, dtype=torch.int8)), "eetq"),
    (holding("QuantizedLinear", "aqlm.inference", codebooks=frozen(1, 8, dtype=HALF)), "aqlm"),
    (holding("FPQuantLinear", "fp_quant.module", qweight=frozen(40, 8, dtype=BYTES)), "fp_quant"),
    (holding("VQuantLinear", "vptq.layers", indices=torch.zeros(1, 9, dtype=WORDS)), "vptq"),
    (holding("NewLinear", "unheard_of", of_linear=False, words=torch.zeros(9, dtype=WORDS)),
     "unheard_of (NewLinear)"),
    (holding("HiggsLinear", "transformers.integrations.higgs", weight=frozen(40, 4, dtype=BYTES),
             scales=frozen(4, 4, dtype=HALF)), "HiggsLinear"),
    (holding("Mxfp4GptOssExperts", "transformers.integrations.mxfp4", of_linear=False,
             down_proj=frozen(2, 8, 4, dtype=BYTES)), "Mxfp4GptOssExperts"),
]  # fmt: skip
