"""What `compile` puts on a quantised linear: its forward, as graphs with sliced sites need it."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparselora_fx.errors import CompileError
from sparselora_fx.ir.markers import DENSE, OBSERVED
from sparselora_fx.ir.ops import OPS
from sparselora_fx.ir.packed_ops import ALL
from sparselora_fx.model.frozen_weights import FrozenWeight
from sparselora_fx.model.packed import REPACKS, STORAGE, Packed
from sparselora_fx.model.unpacking import by_column as turned
from sparselora_fx.runtime.copies import StandIn, put, stand_in_of, take_off


class PackedForward(StandIn):
    """The instance-level ``forward`` of quantised linears. While a graph is traced in which the
    plan makes one sparse, it is one op that names the packed weight; else it is the module's own.

    Bound to the module, and one for all modules that are alike: Dynamo guards which object it is,
    and blocks that are compiled one by one would each be a graph of its own otherwise.

    Args:
        held: names of the module's buffers that say what the packed weight means.
        spec: name of the module's sparsity.
        layout: of the packed weight, encoded.
        follows_autocast: as in `Packed`.
    """

    def __init__(
        self, held: tuple[str, ...], spec: str, layout: str, follows_autocast: bool
    ) -> None:
        self.held = held
        self.spec = spec
        self.layout = layout
        self.follows_autocast = follows_autocast

    def __call__(self, module: nn.Module, *args: Tensor, **kwargs: Tensor) -> object:
        traced = torch.compiler.is_compiling() and torch.is_grad_enabled()
        if not traced or getattr(module, self.spec) in (DENSE, OBSERVED):
            return type(module).forward(module, *args, **kwargs)
        (x,) = (*args, *kwargs.values())
        return self._product(module, x)

    def _product(self, module: nn.Module, x: Tensor) -> Tensor:
        bias = getattr(module, "bias", None)
        dtype = getattr(module, "compute_dtype", None) or x.dtype
        back = x.dtype
        if self.follows_autocast and torch.is_autocast_enabled(x.device.type):
            dtype = back = torch.get_autocast_dtype(x.device.type)
        read = x if x.dtype == dtype else x.to(dtype)
        held = [getattr(module, name) for name in self.held]
        packed = getattr(module, STORAGE)
        made: Tensor = OPS.packed_linear(read, packed, held, self.layout, None, ALL)
        if bias is not None:
            made = made + (bias if bias.dtype == dtype else bias.to(dtype))
        return made if back == dtype else made.to(back)


class Never(StandIn):
    """False, where a module says that its weight may be stored anew when it is evaluated."""

    def __bool__(self) -> bool:
        return False


def held_by(packed: Packed, *, by_column: bool) -> list[Tensor]:
    """What graphs need beside a packed weight: what says what it means and, if wanted and possible,
    a copy of it by column."""
    with torch.no_grad():
        copied = turned(packed.storage, packed.layout) if by_column else None
    return [*packed.held, *([] if copied is None else [copied])]


def put_forward(module: nn.Module, packed: Packed, held: tuple[str, ...], spec: str) -> None:
    """Put a `PackedForward` on a quantised linear."""
    layout = packed.layout._replace(by_column=len(held) > len(packed.held)).encode()
    put(module, "forward", _shared(held, spec, layout, packed.follows_autocast), bound=True)


@functools.cache
def _shared(held: tuple[str, ...], spec: str, layout: str, follows_autocast: bool) -> PackedForward:
    return PackedForward(held, spec, layout, follows_autocast)


def keep_storage(module: nn.Module) -> None:
    """Let evaluation leave a quantised weight as it is stored (see `REPACKS`)."""
    if module.__dict__.get(REPACKS):
        put(module, REPACKS, Never())


def replace_buffers(weight: FrozenWeight, *, by_column: bool) -> None:
    """Put what a quantised weight is now in the place of what it was; see
    `Attachment.refresh_packed`."""
    packed, forward = weight.packed, stand_in_of(weight.module, "forward")
    buffers = weight.module._buffers
    names = forward.held if isinstance(forward, PackedForward) else ()
    if packed is not None:
        held = held_by(packed, by_column=by_column) if names else []
        now = [packed.storage, *held]
        was = [buffers[name] for name in (STORAGE, *names)]
        if list(map(_form, now)) == list(map(_form, was)):
            buffers.update(zip((STORAGE, *names), now, strict=True))
            return
    kind = "plain, or quantised by what is not known" if packed is None else packed.quantiser
    raise CompileError(
        f"{weight.name} was quantised anew since compile, in another way: it is {kind} now; call "
        "sparselora_fx.compile again"
    )


def _form(tensor: Tensor | None) -> object:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def restore_packed(frozen: Iterable[FrozenWeight]) -> None:
    """Undo `put_forward` and `keep_storage`."""
    for module in (weight.module for weight in frozen):
        if isinstance(stand_in_of(module, "forward"), PackedForward):
            take_off(module, "forward")
        take_off(module, REPACKS)
