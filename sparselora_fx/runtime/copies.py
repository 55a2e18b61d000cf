"""What `compile` puts on a model's modules, so that it can be told from the user's own: copies and
pickles of a compiled model are plain, and merging its adapters takes everything off.

A module that carries something of ours gets a ``__reduce_ex__`` of its own, which `copy`, `pickle`
and `torch.save` ask: they see the module as `restore` would leave it, and the compiled one stays.
"""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, SupportsIndex, cast

from torch import nn

from sparselora_fx.errors import CompileError
from sparselora_fx.model.attributes import OURS

PREFIX = "_sparselora"  # of every attribute and buffer that is ours
OWNER = "sparselora_state"  # where a hook keeps the Runtime that placed it; never read while traced
_REDUCE = "__reduce_ex__"
_UNLOADS = ("merge_and_unload", "unload")  # of PEFT's tuners: they hand out the base modules


class StandIn:
    """A callable that stands on a module instance in place of one of its methods.

    ``replaced`` is what stood in the instance's ``__dict__`` before, or None.
    """

    replaced: object = None

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        raise _not_copied()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise _not_copied()


setattr(StandIn, OURS, True)


def _not_copied() -> CompileError:
    return CompileError(
        "a compiled model is copied and pickled as the plain model it was, but here something else "
        "holds its compiled forward (a wrapper such as accelerate's mixed precision, or a class "
        "with a copy method of its own); call sparselora_fx.restore(model), take that wrapper off "
        "(accelerator.unwrap_model(model, keep_fp32_wrapper=False)), then copy or save it"
    )


def put(module: nn.Module, name: str, stand_in: StandIn, *, bound: bool = False) -> None:
    """Let a stand-in answer for a method of one module. ``bound``: the module is its first
    argument, so that it may stand on many."""
    stand_in.replaced = module.__dict__.get(name)
    call = cast(Callable[..., object], stand_in)
    module.__dict__[name] = types.MethodType(call, module) if bound else stand_in
    keep_plain(module)


def take_off(module: nn.Module, name: str) -> None:
    """Give a module the method back that a stand-in replaced, if one stands there."""
    found = stand_in_of(module, name)
    if found is None:
        return
    del module.__dict__[name]
    if found.replaced is not None:
        module.__dict__[name] = found.replaced


def stand_in_of(module: nn.Module, name: str) -> StandIn | None:
    """The stand-in that answers for a method of one module, if one does."""
    found = module.__dict__.get(name)
    found = getattr(found, "__func__", found)  # accelerate binds what it unwraps
    return found if isinstance(found, StandIn) else None


def keep_plain(module: nn.Module) -> None:
    """From now on copies and pickles of this module are without what is ours."""
    module.__dict__.setdefault(_REDUCE, _Reduce(module))


def forget_plain(module: nn.Module) -> None:
    """Undo `keep_plain`."""
    if isinstance(module.__dict__.get(_REDUCE), _Reduce):
        del module.__dict__[_REDUCE]


class _Reduce:
    """``__reduce_ex__`` of one module: its class's own, on a state without what is ours."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)  # no circle: a module's memory goes with its last user

    def __call__(self, protocol: SupportsIndex) -> object:
        module = self.module()
        assert module is not None
        made = type(module).__reduce_ex__(module, protocol)
        if not isinstance(made, tuple) or len(made) < 3:
            return made
        build, args, state, *rest = made
        if isinstance(state, tuple):  # of a class with __slots__
            return build, args, tuple(_plain(part) for part in state), *rest
        return build, args, _plain(state), *rest


def _plain(state: object) -> object:
    if not isinstance(state, dict):
        return state
    return dict(_kept(state))


def _kept(state: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """The entries of a module's ``__dict__`` that are not ours; buffers and hooks are looked
    through."""
    hooks = state.get("_forward_pre_hooks") or {}
    ours = {key for key, hook in hooks.items() if getattr(hook, OWNER, None) is not None}
    for name, value in state.items():
        if name == _REDUCE or name.startswith(PREFIX):
            continue
        stand_in = getattr(value, "__func__", value)
        if isinstance(stand_in, StandIn):
            if stand_in.replaced is not None:
                yield name, stand_in.replaced
        elif name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
            yield name, OrderedDict((k, v) for k, v in value.items() if k not in ours)
        elif name == "_buffers":
            yield name, type(value)((k, v) for k, v in value.items() if not k.startswith(PREFIX))
        elif name == "_non_persistent_buffers_set":
            yield name, {key for key in value if not key.startswith(PREFIX)}
        elif name == "forward" and stand_in_behind(value) is not None:
            raise _not_copied()
        else:
            yield name, value


def stand_in_behind(function: object) -> StandIn | None:
    """The stand-in that a wrapped function leads to, if one does. Such a function is not copied:
    the copy would call the model that it was copied from."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        function = getattr(function, "__func__", function)
        if isinstance(function, StandIn):
            return function
        function = getattr(function, "__wrapped__", None)
    return None


class Unloading(StandIn):
    """A tuner's ``merge_and_unload`` or ``unload`` that takes what is ours off the base model."""

    def __init__(self, module: nn.Module, name: str, undo: Callable[[], None]) -> None:
        self.call, self.undo = getattr(module, name), undo

    def __call__(self, *args: object, **kwargs: object) -> object:
        result = self.call(*args, **kwargs)
        self.undo()
        return result


def watch_unloading(model: nn.Module, undo: Callable[[], None]) -> None:
    """Call ``undo`` after any tuner in the model has handed out the base model."""
    for module in model.modules():
        for name in _UNLOADS:
            if callable(getattr(type(module), name, None)):
                put(module, name, Unloading(module, name, undo))


def stop_watching(model: nn.Module) -> None:
    """Undo `watch_unloading`."""
    for module in model.modules():
        for name in _UNLOADS:
            take_off(module, name)
