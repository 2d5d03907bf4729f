"""Triton kernels. They are installed as ``lares_fast.kernels``, and ``lares_fast.ops`` imports them on first use."""
