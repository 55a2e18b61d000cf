"""How the sliced matmuls become fast: Triton templates on NVIDIA GPUs, gather and matmul elsewhere.

``install`` is the only entry. Everything of Inductor that is used here comes through
`sparselora_fx._torch`.
"""

from sparselora_fx.lowering.install import install
from sparselora_fx.settings import settings

__all__ = ["install", "settings"]
