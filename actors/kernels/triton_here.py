"""Triton, where it is installed: a torch without CUDA comes without it, and then the plain torch references run."""

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, None

HAS_TRITON = triton is not None

__all__ = ["HAS_TRITON", "tl", "triton"]
