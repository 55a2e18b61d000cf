"""The forward that `compile` puts on a model: what each call is, and how it runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparselora_fx import _torch
from sparselora_fx.ahead import run_ahead
from sparselora_fx.copies import StandIn
from sparselora_fx.devices import check_devices
from sparselora_fx.state import State
from sparselora_fx.tokens import Tokens, call_arguments, split_tokens
from sparselora_fx.trimming import label_rows

# Losses that predict label t at token t; every other model with labels[B, L] is taken for a causal
# one.
_UNSHIFTED = ("MaskedLM", "TokenClassification", "PreTraining")


class CompiledForward(StandIn):
    """The instance-level ``model.forward``: training calls run compiled, evaluation runs the
    model's own forward."""

    def __init__(
        self,
        model: nn.Module,
        state: State,
        compiled: Callable[..., Any],
        compile_eval: bool,
        precompile: bool,
        trim_logits: bool,
    ) -> None:
        functools.update_wrapper(self, model.forward)  # first: it copies attributes over
        self.model = model
        self.state = state
        self.compiled = compiled
        self.compile_eval = compile_eval
        self.precompile = state.ahead = precompile
        self.trim_logits = trim_logits
        self.original: Callable[..., Any] = model.forward
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.base_forward = base.forward if base is not model else self.original
        config = getattr(base, "config", None)
        self.cacheable = _takes_use_cache(self.base_forward, config)
        # One token grid would have to serve two stacks of other lengths: every token is sparse
        # then.
        self.encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.shift = predicts_next(model)
        # Under a torch.compile of the user's own this must stay a compilation of its own: inlined
        # into that one, our backend would never see the graph, and all would be dense.
        self.step = torch.compiler.disable(self._step)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if args and args[0] is self.model:
            args = args[1:]  # bound to the model, as accelerate binds what it has unwrapped
        measured = state.measured is not None
        if not state.active or not (self.model.training or self.compile_eval or measured):
            return self.original(*args, **kwargs)
        return self.step(*args, **kwargs)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """One compiled call, and before it those that compile ahead."""
        state = self.state
        if _torch.in_transform():
            state.warn_once(
                "a torch.func transform (vmap, grad, ...) is around this model's call: such calls "
                "are dense and run the model's own forward, for nothing compiled runs inside one"
            )
            return self.original(*args, **kwargs)
        if state.ahead and self.model.training and torch.is_grad_enabled():
            run_ahead(state, lambda: self._run(args, dict(kwargs)))
        before = state.graphs
        out = self._run(args, kwargs)
        # Other sizes than before: the levels to come need graphs for them too.
        state.ahead |= self.precompile and self.model.training and state.graphs > before
        return out

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One compiled call."""
        state = self.state
        arguments = call_arguments(self.base_forward, args, kwargs)
        if self.model.training and _decodes(arguments):
            return self.original(*args, **kwargs)
        check_devices(self.model, arguments)
        sliced = self._set_phase(arguments)
        unset = arguments.get("use_cache") is None and arguments.get("past_key_values") is None
        stepping = self.model.training or state.measured is not None
        if self.cacheable and stepping and unset and (sliced or self._is_in_parts()):
            # A step reads no cache, and with one, keys would escape. A dense graph is left as it
            # is: another one may be compiled to other roundings.
            kwargs["use_cache"] = False
        # Blocks compiled one by one run compiled in a recomputation too.
        state.phase.grad = torch.is_grad_enabled() and not state.blocks
        state.phase.inside = True
        state.calls += 1
        try:
            result = self.compiled(*args, **kwargs)
            state.stepped |= state.words_set is not None and state.words_set[0] > 0
            return result
        finally:
            state.phase.inside = False

    def _is_in_parts(self) -> bool:
        """Whether blocks are compiled, measured or checkpointed one by one, where a cache that they
        write to makes each another graph (or, checkpointed, is switched off with a warning)."""
        apart = bool(self.state.blocks) or self.state.measured is not None
        return apart or any(
            getattr(module, "gradient_checkpointing", False) for module in self.model.modules()
        )

    def _set_phase(self, arguments: Mapping[str, Any]) -> bool:
        """Decide what this call is: dense, or sparse at some level on some tokens. Returns whether
        any linear may be sliced."""
        state, phase = self.state, self.state.phase
        share = state.share() if self.model.training else 0.0
        share = 1.0 if state.measured else share
        calibrating = state.collector is not None and self.model.training and not state.measured
        tokens = None
        if (share or calibrating) and not self.encoder_decoder:
            tokens = split_tokens(state.plan, arguments, shift=self.shift)
        empty = tokens is not None and tokens.split and not bool(tokens.sparse.any())
        sparse = bool(share) and not empty
        if self.model.training and not sparse and state.forced is None:
            state.dense_calls.add("no token was sparse" if share else "the schedule was dense")
        if share and calibrating and state.forced is None:
            state.end_dense_phase()
        observed = calibrating and not sparse
        phase.picked = self._observe(tokens, arguments) if observed else []
        if state.measured and sparse:
            state.set_sparsity(state.measured)
        else:
            state.set_share(share if sparse else 0.0, observed=observed)
        if sparse and tokens is not None and tokens.split:
            # Once and for all: a graph for batches without padding would be one more to compile.
            state.padded |= tokens.has_padding()
            tokens = replace(tokens, padded=state.padded)
        # Blocks that are compiled one by one do not see who reads their rows.
        whole = not state.blocks and state.measured is None
        phase.padded = whole and tokens is not None and tokens.padded
        phase.tokens = tokens.tensors() if sparse and tokens is not None else []
        phase.shift, phase.labels = self.shift, []
        if self.trim_logits and sparse and tokens is not None:
            phase.labels = label_rows(arguments, tokens, phase.tokens, shift=self.shift)
        return sparse and any(max(own) > 0 for own in state.sparsity.values())

    def _observe(self, tokens: Tokens | None, arguments: Mapping[str, Any]) -> list[Tensor]:
        """What is observed of a dense call. Calls that compile ahead, and those without gradients,
        run the same graphs and do not count."""
        state = self.state
        assert state.collector is not None
        counting = state.forced is None and torch.is_grad_enabled()
        if counting and state.step is not None and state.refreshes():
            state.collector.reopen(state.step[0])
        device = next((v.device for v in arguments.values() if isinstance(v, Tensor)), None)
        device = device or next(self.model.parameters()).device
        return state.collector.begin(tokens, device, counting=counting)


def predicts_next(model: nn.Module) -> bool:
    """Whether a model's loss compares what it makes of token t with label t + 1."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    kind = str(getattr(base, "loss_type", None) or type(base).__name__)
    return not any(word in kind for word in _UNSHIFTED)


def _decodes(arguments: Mapping[str, Any]) -> bool:
    """Whether a call generates: without gradients, and with a cache. `generate()` is dense, also
    where it is called on a model in training mode."""
    cached = arguments.get("past_key_values") is not None or arguments.get("use_cache")
    return bool(cached) and not torch.is_grad_enabled()


def _takes_use_cache(forward: Callable[..., Any], config: Any) -> bool:
    """Whether a forward knows ``use_cache``: by name, or (transformers) among its open keywords."""
    known = inspect.signature(forward).parameters
    if "use_cache" in known:
        return True
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    text = getattr(config, "text_config", None)  # of a model that also hears or sees
    return open_ended and (hasattr(config, "use_cache") or hasattr(text, "use_cache"))
