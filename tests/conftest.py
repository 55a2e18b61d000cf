"""Settings every test shares. Nothing heavy is imported before a test needs it."""

import gc
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """A machine's core count must change neither timing nor the order of sums."""
    import torch

    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", help="I/N: the I-th of N shares of the tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one share of the tests. A test stays in its share, whatever others come and go."""
    place, shares = map(int, config.getoption("share").split("/"))
    mine = [item for item in items if zlib.crc32(item.nodeid.encode()) % shares == place]
    if len(mine) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
        items[:] = mine


def pytest_collection_finish() -> None:
    """Modules live as long as the process, and each compilation makes millions of short-lived
    objects: look through them less often. Twelve tests of near misses took 16.0 processor seconds
    with this, imports included, and 18.4 without."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Forget compiled code and recompile counts after each test that compiled something."""
    yield
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Forget the precision and devices that a Trainer or an Accelerator has set for the process:
    the next test's choice of another would be refused."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def as_on_gpu() -> Iterator[None]:
    """Launches are to be few, as on a GPU."""
    from tests.support.shared_launches import shared_launches

    with shared_launches():
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Tests in offgpu/ run kernels in Triton's interpreter, which has to be chosen before any test
    module imports triton."""
    folder, start = Path(__file__).parent / "offgpu", config.invocation_params.dir
    asked = [(start / argument.partition("::")[0]).resolve() for argument in config.args]
    if any(path == folder or path in folder.parents or folder in path.parents for path in asked):
        from tests.offgpu.conftest import why_not

        why_not(config.getoption("markexpr"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is no GPU."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
