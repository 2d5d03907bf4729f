"""Count launches: Triton launches, and PyTorch's operations that compute or copy. Views and allocations are free."""

from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode

from lares_fast.ops import _triton

_FREE = {"alias", "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class _Operations(TorchDispatchMode):
    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function._schema.name.removeprefix("aten::") not in _FREE:
            self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@contextmanager
def counted():
    """Yield the list of all launches within the block, by name and in order. No Triton kernel runs.

    The block must call backends and not registered operators, because the operations within an operator are not seen.
    """
    from lares_fast.kernels import _launch

    names = []
    token = _launch.stand_in.set(lambda kernel, *_: names.append(kernel.fn.__name__))
    try:
        with _triton.anywhere(), _Operations(names):
            yield names
    finally:
        _launch.stand_in.reset(token)
