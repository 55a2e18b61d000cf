"""The forward that `compile` puts on a model: what each call is, and how it runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparselora_fx.ahead import run_ahead
from sparselora_fx.counting import KEY, CountedBatch
from sparselora_fx.errors import CompileError
from sparselora_fx.state import State
from sparselora_fx.step_tokens import step_counts, step_lists
from sparselora_fx.token_lists import TokenCounts, labelled_tokens
from sparselora_fx.tokens import Tokens, argument_names, call_arguments, split_tokens

# Losses that predict label t at token t; every other model with labels[B, L] is taken for a causal
# one.
_UNSHIFTED = ("MaskedLM", "TokenClassification", "PreTraining")


class CompiledForward:
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
        self.replaced = model.__dict__.get("forward")
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.base_forward = base.forward if base is not model else self.original
        self.names = argument_names(self.base_forward)
        config = getattr(base, "config", None)
        self.cacheable = _takes_use_cache(self.base_forward, config)
        # One token grid would have to serve two stacks of other lengths: every token is sparse
        # then.
        state.every_token = bool(getattr(config, "is_encoder_decoder", False))
        self.shift = state.phase.shift = predicts_next(model)
        # Walked once: on a deep model that is a millisecond a step.
        self.checkpoints = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        # Under a torch.compile of the user's own this must stay a compilation of its own: inlined
        # into that one, our backend would never see the graph, and all would be dense.
        self.step = torch.compiler.disable(self._step)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        counted = kwargs.pop(KEY, None)
        measured = state.measured is not None
        if not state.active or not (self.model.training or self.compile_eval or measured):
            return self.original(*args, **kwargs)
        return self.step(counted, *args, **kwargs)

    def _step(self, counted: CountedBatch | None, *args: Any, **kwargs: Any) -> Any:
        """One compiled call, and before it those that compile ahead."""
        state = self.state
        if state.ahead and self.model.training and torch.is_grad_enabled():
            run_ahead(state, lambda: self._run(counted, args, dict(kwargs)))
        before = state.graphs
        out = self._run(counted, args, kwargs)
        # Other sizes than before: the levels to come need graphs for them too.
        state.ahead |= self.precompile and self.model.training and state.graphs > before
        return out

    def _run(
        self, counted: CountedBatch | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One compiled call."""
        state = self.state
        arguments = call_arguments(self.names, args, kwargs)
        if self.model.training and _decodes(arguments):
            return self.original(*args, **kwargs)
        self._allow_replay(True)
        sliced = self._set_phase(arguments, counted)
        unset = arguments.get("use_cache") is None and arguments.get("past_key_values") is None
        stepping = self.model.training or state.measured is not None
        if self.cacheable and stepping and unset and (sliced or self._is_in_parts()):
            # A step reads no cache, and with one, keys would escape. A dense graph is left as it
            # is: another one may be compiled to other roundings.
            kwargs["use_cache"] = False
        # Blocks compiled one by one run compiled in a recomputation too.
        state.phase.grad = torch.is_grad_enabled() and not state.blocks
        state.inside = True
        try:
            result = self.compiled(*args, **kwargs)
            state.stepped |= state.words_set is not None and state.words_set[0] > 0
            return result
        finally:
            state.inside = False
            self._allow_replay(False)

    def _allow_replay(self, begins: bool) -> None:
        """Tell CUDA graphs that a training call begins, or has ended; calls that compile ahead are
        none."""
        state = self.state
        if state.cuda_graphs is not None:
            stepping = self.model.training and state.forced is None and state.measured is None
            state.cuda_graphs.allowed = begins and stepping and torch.is_grad_enabled()

    def _is_in_parts(self) -> bool:
        """Whether blocks are compiled, measured or checkpointed one by one, where a cache that they
        write to makes each another graph (or, checkpointed, is switched off with a warning)."""
        apart = bool(self.state.blocks) or self.state.measured is not None
        return apart or any(module.gradient_checkpointing for module in self.checkpoints)

    def _set_phase(self, arguments: Mapping[str, Any], counted: CountedBatch | None) -> bool:
        """Decide what this call is: dense, or sparse at some level on some tokens. Returns whether
        any linear may be sliced."""
        state, phase = self.state, self.state.phase
        share = state.share() if self.model.training else 0.0
        share = 1.0 if state.measured else share
        calibrating = state.collector is not None and self.model.training and not state.measured
        tokens = labelled = None
        if (share or calibrating) and not state.every_token:
            tokens = split_tokens(state.plan, arguments, shift=self.shift)
        if self.trim_logits and tokens is not None:
            labelled = labelled_tokens(tokens, arguments, shift=self.shift)
        counts = None
        if tokens is not None and (tokens.split or calibrating or labelled is not None):
            counts = step_counts(state, tokens, labelled, arguments, counted)
        empty = tokens is not None and tokens.split and counts is not None and not counts.sparse
        sparse = bool(share) and not empty
        if share and calibrating and state.forced is None:
            state.end_dense_phase()
        observed = calibrating and not sparse
        phase.picked = self._observe(tokens, counts, arguments) if observed else []
        if state.measured and sparse:
            state.set_sparsity(state.measured)
        else:
            state.set_share(share if sparse else 0.0, observed=observed)
        lists = step_lists(state, tokens if sparse else None, labelled, counts)
        phase.tokens = lists.tokens
        phase.labels = [arguments["labels"], *lists.labelled] if lists.labelled else []
        return sparse and any(max(own) > 0 for own in state.sparsity.values())

    def _observe(
        self, tokens: Tokens | None, counts: TokenCounts | None, arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        """What is observed of a dense call. Calls that compile ahead, and those without gradients,
        run the same graphs and do not count."""
        state = self.state
        assert state.collector is not None
        counting = state.forced is None and torch.is_grad_enabled()
        if counting and state.step is not None and state.refreshes():
            state.collector.reopen(state.step[0])
        device = next((v.device for v in arguments.values() if isinstance(v, Tensor)), None)
        device = device or next(self.model.parameters()).device
        total = None if counts is None else counts.sparse
        return state.collector.begin(tokens, total, device, counting=counting)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise CompileError(
            "a compiled model cannot be deep-copied: its forward belongs to this very object; "
            "call sparselora_fx.restore(model), copy it, then compile each copy"
        )


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
