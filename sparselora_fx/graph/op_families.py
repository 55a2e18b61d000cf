"""Names of operations that analyses treat alike, as `op_name` gives them."""

from __future__ import annotations

CASTS = {
    "to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "clone", "detach", "type",
}  # fmt: skip
RESHAPES = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "view_as",
    "unsqueeze",
    "squeeze",
    "reshape_as",
}
PERMUTES = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "t", "moveaxis"}
SPLITS = {"chunk", "split", "unbind", "tensor_split", "split_with_sizes"}
NORMS = {"layer_norm", "rms_norm"}
REDUCTIONS = {"mean", "sum", "var", "std", "norm", "amax", "linalg_vector_norm", "vector_norm"}
