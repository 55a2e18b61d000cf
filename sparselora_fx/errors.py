"""Typed errors. Every message says what was got, what is allowed and how to fix it."""


class SparseLoraError(ValueError):
    """Base class of every error that a user's input can cause."""


class PlanError(SparseLoraError):
    """A sparsity plan is malformed, or names layers that the model does not have."""


class EstimatorError(SparseLoraError):
    """An estimator cannot be built, read, or does not belong to this model."""


class CompileError(SparseLoraError):
    """The model cannot be compiled as asked."""


class SensitivityError(SparseLoraError):
    """A sensitivity table cannot be measured, read, written or drawn."""


class KeywordError(CompileError, TypeError):
    """`compile` was given a keyword that it does not have."""


class DeviceError(SparseLoraError, RuntimeError):
    """A batch is on another device than the model."""


class WatchError(SparseLoraError):
    """A watch cannot be set up as asked, or its state cannot be read."""


class DriftError(SparseLoraError, RuntimeError):
    """Training has drifted from dense training, and the watch was asked to stop it."""


class BackwardError(SparseLoraError, RuntimeError):
    """The backward of a sparse step broke, and a part of its gradients is still there."""
