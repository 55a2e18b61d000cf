"""How the sliced matmuls become fast: Triton templates on NVIDIA GPUs, gather and matmul elsewhere.

`inductor_backend` compiles with them, `install` teaches Inductor, `cache_key` says what that
depends on. Only `inductor` and `inductor_backend` touch what Inductor keeps private.
"""
