"""Pretend that one NVIDIA GPU exists while Inductor generates code. Nothing is ever launched.

What must be replaced: what `torch.cuda`, Dynamo's device interface and Triton's driver say about
the device. Answers that were cached before or inside the block are forgotten at both ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

# multiprocessors, bytes of shared memory that one block may ask for
ARCHITECTURES = {80: (108, 166912), 90: (132, 232448), 100: (148, 232448)}


def properties(arch: int) -> SimpleNamespace:
    """What `torch.cuda.get_device_properties` would say of a data-centre GPU of this
    architecture."""
    multiprocessors, shared = ARCHITECTURES[arch]
    return SimpleNamespace(
        name=f"sm_{arch}",
        major=arch // 10,
        minor=arch % 10,
        multi_processor_count=multiprocessors,
        total_memory=80 << 30,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared + 1024,
        L2_cache_size=50 << 20,
        clock_rate=1980000,
        memory_clock_rate=2619000,
        memory_bus_width=5120,
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName="",
        uuid="none",
    )


class _Driver:
    """What Triton asks of its active driver while it generates and compiles code."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, *_: Any) -> int:
        return 0

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    @staticmethod
    def is_active() -> bool:
        return True


def _torch_cuda(arch: int) -> dict[str, Any]:
    device = properties(arch)
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "get_device_properties": lambda *_: device,
        "get_device_capability": lambda *_: divmod(arch, 10),
        "get_device_name": lambda *_: device.name,
        "is_tf32_supported": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
    }


def _interface(arch: int) -> dict[str, Any]:
    device = properties(arch)
    return {
        "is_available": staticmethod(lambda: True),
        "current_device": staticmethod(lambda: 0),
        "device_count": staticmethod(lambda: 1),
        "get_compute_capability": staticmethod(lambda _=None: arch),
        "get_device_properties": staticmethod(lambda _=None: device),
        "is_triton_capable": staticmethod(lambda _=None: True),
        "raise_if_triton_unavailable": staticmethod(lambda _=None: None),
    }


def _forget(modules: list[ModuleType]) -> None:
    """Clear every cached function of some modules."""
    for module in modules:
        for value in list(vars(module).values()):
            with contextlib.suppress(Exception):  # not all of them can be cleared at any time
                value.cache_clear()


@contextlib.contextmanager
def fake_cuda(arch: int) -> Iterator[None]:
    """Inside the block Inductor finds one NVIDIA GPU of the architecture (80, 90 or 100)."""
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.runtime.hints as hints
    import torch._inductor.runtime.triton_helpers as helpers
    import torch._inductor.utils as inductor_utils
    import torch.utils._triton as triton_utils
    from triton.runtime.driver import driver

    cuda = interfaces.CudaInterface
    interfaces.get_interface_for_device("cpu")  # registers all of them
    cached = [inductor_utils, triton_utils, hints]
    create = hints.DeviceProperties.create
    with contextlib.ExitStack() as stack:
        for name, value in _torch_cuda(arch).items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        for name, value in _interface(arch).items():
            stack.enter_context(patch.object(cuda, name, value))
        worker = {
            name: _interface(arch)[name] for name in ("get_device_properties", "current_device")
        }
        for name, value in worker.items():
            stack.enter_context(patch.object(cuda.Worker, name, value))
        stack.enter_context(
            patch.dict(interfaces.device_interfaces, {"cuda": cuda, "cuda:0": cuda})
        )
        stack.enter_context(patch.object(helpers, "set_driver_to_gpu", lambda *_: None))
        if torch.version.cuda is None:
            stack.enter_context(patch.object(torch.version, "cuda", "13.0"))
        before = getattr(driver, "_active", None)
        driver.set_active(_Driver(arch))
        stack.callback(setattr, driver, "_active", before)
        for forget in (lambda: _forget(cached), getattr(create, "cache_clear", lambda: None)):
            forget()
            stack.callback(forget)
        yield
