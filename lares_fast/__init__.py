"""Latent-reasoning sequential recommendation (LARES): a readable reference, fast kernels, training and serving."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

# Public name -> the module that defines it. The module is loaded on first use, so that importing the package is quick.
_PUBLIC = {
    "LARES": "lares_fast.model",
    "LARESConfig": "lares_fast.config",
    "Recommender": "lares_fast.serve",
    "accelerate": "lares_fast.model",
    "build_info": "lares_fast._native",
    "explain": "lares_fast.ops",
    "load": "lares_fast.serve",
    "save": "lares_fast.serve",
}
_MODULES = ("convert", "data", "ops", "reference", "train")

__all__ = ["__version__", *sorted(_PUBLIC), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"lares_fast.{name}")
    raise AttributeError(f"module 'lares_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
