"""SparseLoRA as a graph compiler: fine-tune with predictor-gated sliced matmuls inside
torch.compile."""

from sparselora_fx.errors import (
    BackwardError,
    CompileError,
    DeviceError,
    DriftError,
    EstimatorError,
    KeywordError,
    PlanError,
    SensitivityError,
    SparseLoraError,
    WatchError,
)
from sparselora_fx.estimator.svd_estimator import SVDEstimator
from sparselora_fx.plan.domain_tables import DomainTables
from sparselora_fx.plan.plan import SparsityPlan
from sparselora_fx.plan.sensitivity_table import SensitivityTable
from sparselora_fx.runtime.named_tokens import output_tokens
from sparselora_fx.runtime.warm_up import warm_up
from sparselora_fx.user.calibration_file import load_calibration, save_calibration
from sparselora_fx.user.collating import count_tokens
from sparselora_fx.user.compile import compile, restore, step
from sparselora_fx.user.cost import Cost, cost
from sparselora_fx.user.drift import Drift, drift
from sparselora_fx.user.explain import explain
from sparselora_fx.user.graphs import graphs
from sparselora_fx.user.record import Recording, record
from sparselora_fx.user.report import report
from sparselora_fx.user.sensitivity import sensitivity
from sparselora_fx.user.watch_file import load_watch, save_watch
from sparselora_fx.watch.settings import Watch

__version__ = "0.1.0"
__all__ = [
    "BackwardError",
    "CompileError",
    "Cost",
    "DeviceError",
    "DomainTables",
    "Drift",
    "DriftError",
    "EstimatorError",
    "KeywordError",
    "PlanError",
    "Recording",
    "SVDEstimator",
    "SensitivityError",
    "SensitivityTable",
    "SparseLoraError",
    "SparsityCallback",
    "SparsityPlan",
    "Watch",
    "WatchError",
    "compile",
    "cost",
    "count_tokens",
    "drift",
    "explain",
    "graphs",
    "load_calibration",
    "load_watch",
    "output_tokens",
    "record",
    "report",
    "restore",
    "save_calibration",
    "save_watch",
    "sensitivity",
    "step",
    "warm_up",
]


def __getattr__(name: str) -> object:
    """`SparsityCallback` needs transformers, which a first import should not."""
    if name == "SparsityCallback":
        from sparselora_fx.user.trainer import SparsityCallback

        return SparsityCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
