"""The forward that `compile` puts on a model: what each call is, and how it runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparselora_fx import _torch
from sparselora_fx.model.preserve import RandomState
from sparselora_fx.model.signature import argument_names, call_arguments
from sparselora_fx.runtime.caching import (
    AS_CALLED,
    LEFT_OUT,
    STANDS_IN,
    decodes,
    is_unset,
    may_be_packed,
    takes_use_cache,
)
from sparselora_fx.runtime.copies import StandIn
from sparselora_fx.runtime.counting import KEY, CountedBatch, ListedTokens
from sparselora_fx.runtime.devices import check_devices
from sparselora_fx.runtime.failing_safe import shapes_of
from sparselora_fx.runtime.giving_up import note_call
from sparselora_fx.runtime.named_tokens import OUTPUT_TOKENS, output_tokens
from sparselora_fx.runtime.runtime import Runtime
from sparselora_fx.runtime.step_tokens import (
    is_worth_it,
    known_tokens,
    observed_rows,
    rows_of,
    shift_of,
    step_lists,
    step_tokens,
)
from sparselora_fx.runtime.warm_up import warm_up_levels


class CompiledForward(StandIn):
    """The instance-level ``model.forward``: training calls run compiled, evaluation runs the
    model's own forward."""

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        compiled: Callable[..., object],
        compile_eval: bool,
        precompile: bool,
        trim_logits: bool,
    ) -> None:
        functools.update_wrapper(self, model.forward)  # first: it copies attributes over
        self.model = model
        self.runtime = runtime
        self.compiled = compiled
        self.compile_eval = compile_eval
        self.precompile = runtime.warm_up_next = precompile
        self.trim_logits = trim_logits
        self.untrimmed = False  # the call under way should trim logits, and cannot
        self.decided = False  # what the call under way is: what raises before that is no graph's
        self.original: Callable[..., Any] = model.forward
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.base_forward = base.forward if base is not model else self.original
        self.names = argument_names(self.original, self.base_forward)
        config = getattr(base, "config", None)
        self.cacheable = takes_use_cache(self.base_forward, config)
        # One token grid would have to serve two stacks of other lengths: every token is sparse
        # then.
        runtime.every_token = bool(getattr(config, "is_encoder_decoder", False))
        self.takes_key = OUTPUT_TOKENS not in inspect.signature(self.base_forward).parameters
        # Walked once: on a deep model that is a millisecond a step.
        self.checkpoints = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        # Under a torch.compile of the user's own this must stay a compilation of its own: inlined
        # into that one, our backend would never see the graph, and all would be dense.
        self.step = torch.compiler.disable(self._step)

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        if self.takes_key and self.runtime.active and OUTPUT_TOKENS in kwargs:
            with output_tokens(kwargs.pop(OUTPUT_TOKENS)):
                return self(*args, **kwargs)
        runtime = self.runtime
        if args and args[0] is self.model:
            args = args[1:]  # bound to the model, as accelerate binds what it has unwrapped
        counted = kwargs.pop(KEY, None)
        compiled = self.model.training or self.compile_eval or runtime.call.is_measurement
        if not runtime.active or not compiled:
            return self.original(*args, **kwargs)
        return self.step(counted, *args, **kwargs)

    def _step(self, counted: CountedBatch | None, *args: object, **kwargs: object) -> object:
        """One compiled call, and before it those that warm up."""
        runtime = self.runtime
        if _torch.in_transform():
            runtime.notices.warn(
                "a torch.func transform (vmap, grad, ...) is around this model's call: such calls "
                "are dense and run the model's own forward, for nothing compiled runs inside one"
            )
            return self.original(*args, **kwargs)
        if runtime.warm_up_next and self.model.training and torch.is_grad_enabled():
            call = functools.partial(self._run, counted, args)
            runtime.safety.ahead(lambda: warm_up_levels(runtime, lambda: call(dict(kwargs))))
        before = runtime.graphs
        run = self._safely if self._is_step() else self._run
        out = run(counted, args, kwargs)
        # Other sizes than before: the levels to come need graphs for them too.
        runtime.warm_up_next |= self.precompile and self.model.training and runtime.graphs > before
        return out

    def _safely(
        self, counted: CountedBatch | None, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """A training call; if it is sparse and breaks, the same call dense."""
        runtime, values = self.runtime, [*args, *kwargs.values()]

        def plain() -> object:
            runtime.set_sparsity_scale(0.0)  # checkpointed blocks may read it in the backward
            return self.original(*args, **kwargs)

        runtime.safety.begin(self.model, runtime.attached.own_buffers())
        out = runtime.safety.run(
            lambda: self._run(counted, args, dict(kwargs)),
            plain,
            shapes_of(values),
            RandomState.of(values),
            lambda: self.decided and runtime.sparse_now,
        )
        runtime.safety.note_recompiles(max(runtime.recompiles.again.values(), default=0))
        return out

    def _run(
        self, counted: CountedBatch | None, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """One compiled call. A graph that is traced may show that the call was prepared wrongly
        (other tokens carry loss than was assumed): it begins anew, before that graph has run."""
        runtime = self.runtime
        tally, dense_calls = runtime.tally.copy(), set(runtime.dense_calls)
        while True:
            runtime.anew = False
            if runtime.given_up and not runtime.graphs:  # else dense graphs would be made anew
                runtime.attached.unhook()
            runtime.tally, runtime.dense_calls = tally.copy(), set(dense_calls)
            runtime.tally.due.clear()
            try:
                result = self._call(counted, args, dict(kwargs))
            except Exception:
                if not runtime.anew:
                    runtime.tally, runtime.dense_calls = tally, dense_calls
                    raise
                continue
            if not runtime.anew:
                return result

    def _call(
        self, counted: CountedBatch | None, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        runtime, trace_inputs = self.runtime, self.runtime.trace_inputs
        self.decided, arguments = False, call_arguments(self.names, args, kwargs)
        if self.model.training and decodes(arguments):
            return self.original(*args, **kwargs)
        on = runtime.frozen[0].weight  # a walk to the model's first parameter takes longer
        check_devices(self.model, on.device, arguments)
        runtime.attached.refresh_packed()
        self._allow_replay(True)
        begun = runtime.speed.begin(on.device) if self._is_step() else None
        sliced = self._set_trace_inputs(known_tokens(runtime, arguments), counted)
        self.decided = True
        trace_inputs.caching = self._caching(sliced)
        packed = trace_inputs.caching == STANDS_IN and may_be_packed(arguments)
        if self.cacheable and trace_inputs.caching and is_unset(arguments) and not packed:
            kwargs["use_cache"] = False
        # Blocks compiled one by one run compiled in a recomputation too.
        trace_inputs.grad = torch.is_grad_enabled() and not runtime.blocks
        trace_inputs.under_way = True
        runtime.calls += 1
        try:
            result = self._made(arguments, args, kwargs, sliced)
            runtime.stepped |= runtime.sparse_now
            if not runtime.anew:
                if self.untrimmed:
                    runtime.tally.warn_untrimmed()
                runtime.tally.tell()
                note_call(runtime)
                runtime.speed.watch(begun, result, rows_of(arguments))
            return result
        finally:
            trace_inputs.under_way = False
            trace_inputs.caching = AS_CALLED
            self._allow_replay(False)

    def _made(
        self,
        arguments: Mapping[str, Any],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        sliced: bool,
    ) -> object:
        """Make the compiled call, or let whoever looks at steps make it."""
        runtime = self.runtime

        def compiled() -> object:
            with runtime.recompiles.watching(self._kind(), arguments):
                return self.compiled(*args, **kwargs)

        def dense() -> object:
            with runtime.trace_inputs.left():
                return self.original(*args, **kwargs)

        if runtime.around_step is None or not self._is_step():
            return compiled()
        return runtime.around_step(compiled, dense, arguments, sliced)

    def _allow_replay(self, begins: bool) -> None:
        """Tell CUDA graphs that a training call begins, or has ended; warm-up calls are none."""
        runtime = self.runtime
        if runtime.cuda_graphs is not None:
            runtime.cuda_graphs.allowed = begins and self._is_step()

    def _is_step(self) -> bool:
        """Whether the present call is one of training, with gradients."""
        return self.model.training and self.runtime.call.is_step and torch.is_grad_enabled()

    def _kind(self) -> Hashable:
        """What tells this call from others for which graphs of their own are compiled."""
        runtime, trace_inputs = self.runtime, self.runtime.trace_inputs
        specs = runtime.specs_set or tuple(runtime.call.sparsity.items())
        caps = tuple((runtime.caps_set or {}).items())
        lists = (
            len(trace_inputs.tokens),
            len(trace_inputs.picked),
            len(trace_inputs.labels),
            trace_inputs.padded,
        )
        return specs, caps, lists, self.model.training, torch.is_grad_enabled()

    def _caching(self, sliced: bool) -> str:
        """What becomes of the KV cache of this call. A step reads none, and with one, keys would
        escape. A dense graph is left as it is: another one may be compiled to other roundings. Only
        where blocks are compiled, measured or checkpointed one by one, a cache that they write to
        makes each another graph (or, checkpointed, is switched off with a warning)."""
        measured = self.runtime.call.is_measurement
        if not (self.model.training or measured):
            return AS_CALLED
        if self.model.training and any(m.gradient_checkpointing for m in self.checkpoints):
            return LEFT_OUT
        apart = bool(self.runtime.blocks) or measured
        return STANDS_IN if sliced or apart else AS_CALLED

    def _set_trace_inputs(self, arguments: Mapping[str, Any], counted: CountedBatch | None) -> bool:
        """Decide what this call is: dense, or sparse at some level on some tokens. Returns whether
        any linear may be sliced."""
        runtime, trace_inputs = self.runtime, self.runtime.trace_inputs
        trace_inputs.arguments = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
        # A pass without gradients trains nothing: a reference, a teacher, old probabilities.
        training = self.model.training and torch.is_grad_enabled()
        sparsity_scale = runtime.sparsity_scale() if training and not runtime.stays_dense else 0.0
        sparsity_scale = 1.0 if runtime.call.sparsity else sparsity_scale
        calibrating = runtime.collector is not None and self.model.training
        calibrating &= not (runtime.call.is_measurement or runtime.stays_dense)
        shift = shift_of(runtime, arguments)
        tokens = listed = None
        if (sparsity_scale or calibrating) and not runtime.every_token:
            tokens, listed = step_tokens(runtime, arguments, counted, shift)
        labelled = None if tokens is None else tokens.labelled
        trim = self.trim_logits and shift is not None and labelled is not None
        if tokens is not None and (tokens.split or calibrating or trim):
            listed = ListedTokens.of(tokens) if listed is None else listed
        counts = None if listed is None else listed.counts
        tally = runtime.tally.copy()
        sparse = bool(sparsity_scale) and is_worth_it(runtime, tokens, counts)
        compared = sparse and runtime.runs_dense_to_compare(sparsity_scale)
        if compared:
            runtime.tally, sparse = tally, False
        warming = runtime.call.has_level
        usual = not (sparse or compared or runtime.stays_dense or warming)
        if self.model.training and usual:
            runtime.dense_calls.add(
                "no token was sparse" if sparsity_scale else "the schedule was dense"
            )
        if sparsity_scale and calibrating and not warming:
            runtime.end_online_calibration()
        observed = calibrating and not (sparse or compared)
        trace_inputs.picked = observed_rows(runtime, tokens, counts, arguments) if observed else []
        if runtime.call.sparsity and sparse:
            runtime.set_sparsity(runtime.call.sparsity)
        else:
            runtime.set_sparsity_scale(sparsity_scale if sparse else 0.0, observed=observed)
        lists = step_lists(runtime, tokens if sparse else None, listed, trim=trim)
        trace_inputs.tokens = lists.tokens.encode()
        trace_inputs.every = sparse and lists.tokens.counted is None
        trace_inputs.by_labels = tokens is not None and bool(sparsity_scale)
        trace_inputs.labels = [arguments["labels"], *lists.labelled] if lists.labelled else []
        trace_inputs.shift = trace_inputs.shift if shift is None else shift
        labels = arguments.get("labels")
        self.untrimmed = self.trim_logits and sparse and shift is None and labels is not None
        return sparse and any(max(own) > 0 for own in runtime.sparsity.values())
