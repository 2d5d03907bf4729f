"""A hook of mkdocs: fill the pages of the API reference with the public names of a module.

A page has the line ``<!-- public names of MODULE -->``. The hook replaces it with one entry for each name in ``__all__``, or,
in a module without ``__all__``, for each public function. So a new public name needs no edit of a page.
"""

from __future__ import annotations

import importlib
import inspect
import re
from types import ModuleType
from typing import Any

_PLACE = re.compile(r"<!-- public names of ([\w.]+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every place on a page; mkdocs calls this."""
    return _PLACE.sub(lambda found: entries(found[1]), markdown)


def public_names(module: ModuleType) -> list[str]:
    """Return the public names of ``module``, without modules and the version."""
    names = getattr(module, "__all__", None)
    if names is None:
        return [name for name, value in vars(module).items() if inspect.isfunction(value) and is_own(module, name)]
    return [name for name in names if name != "__version__" and not inspect.ismodule(getattr(module, name))]


def is_own(module: ModuleType, name: str) -> bool:
    """Return whether the public function ``name`` is defined in ``module``."""
    return not name.startswith("_") and getattr(module, name).__module__ == module.__name__


def entries(name: str) -> str:
    """Return the Markdown of the public names of the module ``name``."""
    module = importlib.import_module(name)
    return "\n\n".join(_entry(module, public) for public in public_names(module))


def _entry(module: ModuleType, public: str) -> str:
    value = getattr(module, public)
    anchor = f'<a id="{module.__name__}.{public}"></a>\n'
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return f"{anchor}\n## {public}\n\n```python\n{public} = {value!r}\n```"
    # The place of the definition, because a function can have the name of its module.
    place = f"{value.__module__}.{value.__qualname__}"
    return f"{anchor}\n::: {place}\n    options:\n      heading: {public}\n      toc_label: {public}"
