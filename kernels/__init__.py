"""Triton kernels; installed as ``lares_fast.kernels`` and imported lazily, by ``lares_fast.ops`` only."""
