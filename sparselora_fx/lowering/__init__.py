"""How the sliced matmuls become fast: Triton templates on NVIDIA GPUs, gather and matmul elsewhere.

``install`` teaches Inductor, ``key`` says what that depends on. Everything of Inductor that is used
here comes through `sparselora_fx._torch`.
"""

import hashlib
from pathlib import Path

from sparselora_fx.lowering import measured
from sparselora_fx.lowering.install import install
from sparselora_fx.settings import check_bounds

_HERE = Path(__file__).parent
# The files that hold the ops' bodies and derivatives, beside those in this folder.
_TRACED = (
    "_torch", "ops", "scores", "fakes", "autograd", "checks", "settings", "checkpointing",
)  # fmt: skip


def key() -> str:
    """A hash of all that decides what our ops become: bodies, lowerings, templates, settings.

    Raises `CompileError` for a setting that cannot be read.
    """
    files = [_HERE.parent / f"{name}.py" for name in _TRACED]
    found = _HERE.rglob("*.*")
    files += sorted(file for file in found if file.suffix in (".py", ".jinja"))
    digest = hashlib.sha256(f"check_bounds={check_bounds()},{measured.key()}".encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return f"sparselora_fx-{digest.hexdigest()}"


__all__ = ["install", "key"]
