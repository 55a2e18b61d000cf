"""A batch must be where its model is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparselora_fx.errors import DeviceError

_GRIDS = ("input_ids", "inputs_embeds")  # models move masks and labels themselves


def check_devices(model: nn.Module, first: torch.device, arguments: Mapping[str, object]) -> None:
    """Raise `DeviceError` if a batch's tokens are on another device than all of a model.
    ``first``: that of some of its weights.

    A model that is spread over devices moves its inputs itself (accelerate's hooks).
    """
    for name in _GRIDS:
        value = arguments.get(name)
        if not isinstance(value, Tensor) or value.device == first:
            continue
        places = {parameter.device for parameter in model.parameters()}
        if len(places) == 1 and not any(hasattr(m, "_hf_hook") for m in model.modules()):
            raise DeviceError(
                f"Expected all tensors to be on the same device, but {name} is on {value.device} "
                f"and the model on {first}; move the batch: "
                "batch = {k: v.to(model.device) for k, v in batch.items()}"
            )
