"""The part of the native backend that ``topk`` and ``target_rank`` share."""

from __future__ import annotations

from lares_fast._errors import InputError
from lares_fast._native_call import call_native, contiguous, thread_count
from lares_fast.ops._catalog_calls import CatalogCall
from lares_fast.ops._catalog_checks import native_obstacle


def obstacle(call: CatalogCall) -> str | None:
    """Return why the native backend cannot run ``call``, as a clause, or ``None``."""
    return native_obstacle(call.query, call.items)


def run(call: CatalogCall, threads: int | None, **arguments: object) -> None:
    """Call the function ``call.op`` of the native module, with ``arguments`` in addition to the arguments of every call.

    Raises:
        InputError: a value of an index tensor is wrong, or a copy does not fit into memory.
    """
    offsets = ids = None
    if call.exclude is not None:
        offsets, ids = contiguous("exclude offsets", call.exclude.offsets), contiguous("exclude ids", call.exclude.ids)
        if int(offsets[-1]) != ids.shape[0]:
            # The native code reads as many ids as the offsets say.
            call.check_values()
    try:
        call_native(
            call.op,
            query=contiguous("query", call.query),
            items=contiguous("items", call.items),
            bias=None if call.bias is None else contiguous("bias", call.bias),
            exclude_offsets=offsets,
            exclude_ids=ids,
            B=call.query.shape[0],
            N=call.items.shape[0],
            D=call.query.shape[1],
            threads=thread_count(threads),
            **arguments,
        )
    except InputError:
        # The native code found a wrong value. This check names it.
        call.check_values()
        raise
