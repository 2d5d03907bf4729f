"""``ops.linear_cross_entropy`` and ``ops.target_logprob``: the tolerance law, ranks, contracts, errors."""

import multiprocessing
import threading

import pytest
import torch

from lares_fast import LARESConfig, _dispatch, _native, model, ops, reference
from lares_fast._errors import BackendError, InputError
from lares_fast._random import Draw
from lares_fast.ops import _triton
from tests.support import oracle
from tests.support.catalog_cases import BACKENDS, integers, needs_native

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# One below, at and above a panel, a tile of 96, and parts of the catalog.
COUNTS = [1, 2, 11, 12, 13, 23, 24, 25, 47, 48, 49, 95, 96, 97, 1025, 3001]
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 191, 192, 193]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def case(M, N, D, *, skip_pad=False, size=1.0):
    hidden, items = torch.randn(M, D), torch.randn(N, D) * size
    return hidden, items, torch.randint(int(skip_pad), N, (M,)), torch.randn(M)


def run(function, hidden, items, target, grad, **options):
    """Value and gradients of ``function`` under the upstream gradient ``grad``, cut to the value's shape."""
    hidden, items = hidden.clone().requires_grad_(), items.clone().requires_grad_()
    value = function(hidden, items, target, **options)
    value.backward(grad if value.dim() else grad.flatten()[0])
    return {"value": value.detach()}, {"hidden": hidden.grad, "items": items.grad}


def check(function, hidden, items, target, grad, **options):
    """``ops.function`` by the law, against ``reference.function``."""
    backend = options.pop("backend")
    oracles = getattr(reference, function)
    truth = run(oracles, hidden.double(), items.double(), target, grad.double(), **options)
    twin = run(oracles, hidden, items, target, grad, **options)
    before = _dispatch.calls["linear_cross_entropy", backend]
    result = run(getattr(ops, function), hidden, items, target, grad, **options, backend=backend)
    assert _dispatch.calls["linear_cross_entropy", backend] == before + 2
    for kind, values in zip(("forward", "gradient"), zip(result, twin, truth, strict=True), strict=True):
        oracle.check(kind, *values)


@pytest.mark.parametrize("N", COUNTS)
def test_every_number_of_items(N, backend):
    check("target_logprob", *case(9, N, 17), backend=backend)


@pytest.mark.parametrize("M", ROWS)
def test_every_number_of_rows(M, backend):
    check("target_logprob", *case(M, 130, 8), backend=backend)


@pytest.mark.parametrize("D", [1, 3, 16, 17, 64, 65, 128, 256])
def test_every_width(D, backend):
    check("target_logprob", *case(21, 200, D, size=D**-0.5), backend=backend)


def test_more_rows_than_share_a_buffer(backend):
    check("target_logprob", *case(4100, 60, 4), backend=backend)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("scale", [1.0, 1 / 0.07, 1e-3])
@pytest.mark.parametrize("skip_pad", [False, True])
def test_reductions(reduction, scale, skip_pad, backend):
    hidden, items, target, grad = case(37, 1500, 32, skip_pad=skip_pad)
    hidden, items = torch.nn.functional.normalize(hidden), torch.nn.functional.normalize(items)
    check(
        "linear_cross_entropy",
        hidden,
        items,
        target,
        grad,
        backend=backend,
        reduction=reduction,
        scale=scale,
        skip_pad=skip_pad,
    )


def test_leading_dimensions(backend):
    hidden, items, target, grad = case(24, 300, 16)
    check("target_logprob", hidden.reshape(2, 3, 4, 16), items, target.reshape(2, 3, 4), grad.reshape(2, 3, 4), backend=backend)


def test_uniform_over_many_items(backend):
    """Equal terms are where a single fp32 sum over a large catalog drifts furthest."""
    items = (torch.arange(4) - 1.5)[torch.arange(200_000) % 4][:, None].contiguous()
    check(
        "target_logprob", torch.tensor([[1.0], [0.1]]), items, torch.tensor([0, 7]), torch.tensor([1.0, -2.0]), backend=backend
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(sign, backend):
    """Exact scores of several hundred, the target's the highest or the lowest."""
    hidden, items = integers(40, 16) * 4, integers(700, 16) * 8
    scores = sign * (hidden @ items.T)
    check("target_logprob", hidden, items, scores.argmax(1), torch.randn(40), backend=backend)


@pytest.mark.parametrize("gap", [4.0, 12.0, 20.0])
def test_saturated(gap, backend):
    """1 - p(target) is exp(-gap): neither log p nor the target's gradient may lose it."""
    items = torch.zeros(50, 3)
    items[7, 0] = gap
    hidden = torch.tensor([[1.0, 0.5, 0.0]]).repeat(5, 1)
    check("target_logprob", hidden, items, torch.full((5,), 7), torch.randn(5), backend=backend)
    logprob = ops.target_logprob(hidden, items, torch.full((5,), 7), backend=backend)
    truth = -torch.log1p(49 * torch.exp(torch.tensor(-gap).double())).expand(5)
    torch.testing.assert_close(logprob.double(), truth, rtol=1e-6, atol=0)


def test_ascending_scores(backend):
    """Every panel beats the one before by far."""
    items = torch.arange(2000.0)[:, None] * 4
    check("target_logprob", torch.ones(5, 1), items, torch.tensor([0, 3, 1000, 1998, 1999]), torch.randn(5), backend=backend)


WRONG = {
    "PAD is not skipped": lambda f: lambda *a, skip_pad, **k: f(*a, **k),
    "scale is forgotten": lambda f: lambda *a, scale, **k: f(*a, **k),
    "last item unseen": lambda f: lambda h, i, t, **k: f(h, torch.cat((i[:-1], i[-1:] - 50)), t, **k),
}
WRONG_BACKWARD = {
    "PAD is not skipped": lambda f: lambda *a, skip_pad, **k: f(*a, **k),
    "gradients lack the scale": lambda f: lambda *a, scale, **k: [g / scale for g in f(*a, scale=scale, **k)],
    "upstream gradient is uniform": lambda f: lambda grad, *a, **k: f(grad.mean().expand(len(grad)), *a, **k),
    "one tile of items without gradient": lambda f: lambda *a, **k: _zeroed(f(*a, **k), 1),
    "one tile of rows without gradient": lambda f: lambda *a, **k: _zeroed(f(*a, **k), 0),
    "the target's own column": lambda f: lambda g, h, i, t, *a, **k: f(g, h, i, (t % (len(i) - 1)) + 1, *a, **k),
}


def _zeroed(gradients, which):
    gradients[which][4:8] = 0
    return gradients


def check_all_options():
    hidden, items, target, grad = case(37, 150, 16, skip_pad=True)
    check("target_logprob", hidden, items, target, grad, backend="native", scale=0.5, skip_pad=True)


@needs_native
@pytest.mark.parametrize(
    ("name", "bug"),
    [
        *(("target_logprob", bug) for bug in WRONG.items()),
        *(("target_logprob_backward", bug) for bug in WRONG_BACKWARD.items()),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_a_planted_bug_is_caught(name, bug, monkeypatch):
    check_all_options()
    monkeypatch.setattr(_native, name, bug[1](getattr(_native, name)))
    with pytest.raises(AssertionError):
        check_all_options()


# M, N, D, dtype, skip_pad, scale. A tile is 16, 32 or 64 rows by the bytes of a row; a part at least 8 tiles of items.
TRITON = [
    (1, 1, 1, torch.float32, False, 1.0),
    (5, 63, 17, torch.float32, False, 0.5),
    (64, 65, 16, torch.float32, True, 1 / 0.07),
    (33, 600, 64, torch.float32, True, 1.0),
    (15, 257, 130, torch.float32, False, 1.0),
    (17, 300, 256, torch.bfloat16, True, 1.0),
    (65, 64, 32, torch.bfloat16, False, 0.5),
    (31, 129, 64, torch.bfloat16, True, 1.0),
    (32, 520, 24, torch.float16, False, 1.0),
    (2, 2, 8, torch.float16, True, 1.0),
]


def check_triton(M, N, D, dtype, skip_pad, scale):
    hidden, items, target, grad = case(M, N, D, skip_pad=skip_pad, size=D**-0.5)
    inputs = [x.to(dtype) for x in (hidden, items)]
    check("target_logprob", *inputs, target, grad.to(dtype), backend="triton", scale=scale, skip_pad=skip_pad)


@pytest.fixture
def interpreted(monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        yield memory


@pytest.mark.interpreted
@pytest.mark.usefixtures("interpreted")
class TestTriton:
    """The kernels' source, run on the CPU: every address checked, outputs poisoned with NaN."""

    @pytest.mark.parametrize("arguments", TRITON, ids=str)
    def test_law(self, arguments):
        check_triton(*arguments)

    @pytest.mark.parametrize("ties", ["order", "strict"])
    @pytest.mark.parametrize("skip_pad", [False, True])
    @pytest.mark.parametrize("N", [2, 65, 700])
    def test_rank(self, ties, skip_pad, N):
        test_rank_is_that_of_target_rank(ties, skip_pad, N, "triton")

    def test_rank_in_bf16(self):
        """Of scores that are exact in bf16 products and fp32 sums, many of them equal."""
        hidden, items, target = integers(30, 5).bfloat16(), integers(300, 5).bfloat16(), torch.randint(0, 300, (30,))
        rank = ops.target_logprob_and_rank(hidden, items, target, backend="triton")[1]
        assert torch.equal(rank, reference.target_rank(hidden.float(), items.float(), target))

    @pytest.mark.parametrize("gap", [4.0, 20.0])
    def test_saturated(self, gap):
        test_saturated(gap, "triton")

    def test_large_logits(self):
        test_large_logits(1, "triton")

    def test_ascending_scores(self):
        test_ascending_scores("triton")

    def test_uniform_over_many_items(self, monkeypatch):
        kernels = _triton.kernels("linear_cross_entropy")
        # One part: the longest sums.
        monkeypatch.setattr(kernels, "PROGRAMS", 1)
        items = torch.zeros(20_000, 4)
        check("target_logprob", torch.ones(2, 4), items, torch.tensor([0, 7]), torch.tensor([1.0, -2.0]), backend="triton")

    def test_infinities_and_nan(self):
        test_infinities_and_nan("triton")

    def test_a_row_that_is_not_finite_spoils_the_gradients(self):
        test_a_row_that_is_not_finite_spoils_the_gradients("triton")

    @pytest.mark.parametrize("which", [0, 1])
    def test_gradient_of_one_argument(self, which):
        test_gradient_of_one_argument(which, "triton")

    def test_no_rows(self):
        test_no_rows("triton")


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_programs_changes_no_bit(dtype, monkeypatch):
    from tests.support import triton_interpreter

    hidden, items, target, grad = (x.to(dtype) if x.is_floating_point() else x for x in case(40, 600, 16, size=0.3))

    def bits(order):
        with triton_interpreter.interpreted(monkeypatch, order):
            value, gradients = run(ops.target_logprob, hidden, items, target, grad, backend="triton")
            rank = ops.target_logprob_and_rank(hidden, items, target, backend="triton")[1]
        return [rank, *value.values(), *gradients.values()]

    first = bits(None)
    for order in (lambda n: range(n - 1, -1, -1), lambda n: torch.randperm(n).tolist()):
        assert all(map(torch.equal, first, bits(order)))


TRITON_BUGS = {
    "one item too many": ("(item[None, :] < high) & (item[None, :] !=", "(item[None, :] <= high) & (item[None, :] !="),
    "PAD is not skipped": ("len(items), int(skip_pad)", "len(items), 0"),
    "scale forgotten in the backward": ("p = tl.exp(raw * scale -", "p = tl.exp(raw -"),
    "a tile of items without gradient": ('triton.cdiv(N, run.keywords["S"])', 'N // run.keywords["S"]'),
    "a tile of rows unwritten": (
        "run(softmax_backward_hidden, tiles * parts,",
        "run(softmax_backward_hidden, tiles * parts - 1,",
    ),
    "a part written to the first": ("tl.store(COUNT + number * M + row", "tl.store(COUNT + row"),
    "sum not moved with its origin": ("total = total * shrink", "total = total * 1"),
    "the target's own column": ("miss[:, None], -p)", "-p, -p)"),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("bug", TRITON_BUGS)
def test_a_bug_planted_in_triton_is_caught(bug, monkeypatch, tmp_path):
    from triton.runtime.errors import InterpreterError

    from tests.support import triton_interpreter

    stem = "linear_cross_entropy"
    triton_interpreter.plant(monkeypatch, tmp_path, (stem,), stem, *TRITON_BUGS[bug])
    with triton_interpreter.interpreted(monkeypatch), pytest.raises((AssertionError, InterpreterError)):
        check_triton(37, 1030, 16, torch.float32, True, 0.5)
        test_rank_is_that_of_target_rank("order", True, 1030, "triton")


@pytest.mark.parametrize(("hidden", "reason"), [
    (torch.ones(2, 3), "it runs on an NVIDIA GPU, and the tensors are on cpu"),
    (torch.ones(2, 3).double(), "it takes float32, float16 and bfloat16, and hidden is torch.float64"),
    (torch.ones(2, 257), "it takes 1 to 256 columns, and hidden has 257"),
])  # fmt: skip
def test_triton_says_why_not(hidden, reason):
    with pytest.raises(BackendError, match=reason):
        ops.target_logprob(hidden, hidden, torch.tensor([0, 1]), backend="triton")


@pytest.mark.parametrize("ties", ["order", "strict"])
@pytest.mark.parametrize("skip_pad", [False, True])
@pytest.mark.parametrize("N", [2, 25, 700, 2000])
def test_rank_is_that_of_target_rank(ties, skip_pad, N, backend):
    first = int(skip_pad)
    hidden, items, target = integers(30, 5), integers(N, 5), torch.randint(first, N, (30,))
    logprob, rank = ops.target_logprob_and_rank(hidden, items, target, ties=ties, skip_pad=skip_pad, backend=backend)
    assert torch.equal(rank, reference.target_rank(hidden, items[first:], target - first, ties=ties))
    assert torch.equal(rank, reference.target_logprob_and_rank(hidden, items, target, ties=ties, skip_pad=skip_pad)[1])
    assert torch.equal(logprob, ops.target_logprob(hidden, items, target, skip_pad=skip_pad, backend=backend))


def test_equal_scores_earn_nothing(backend):
    hidden, items = torch.randn(64, 64), torch.randn(1, 64).expand(500, 64)
    target = torch.arange(64) + 100
    assert torch.equal(ops.target_logprob_and_rank(hidden, items, target, backend=backend)[1], target)
    assert not ops.target_logprob_and_rank(hidden, items, target, ties="strict", backend=backend)[1].any()


def test_shapes_with_rank(backend):
    hidden, items, target, _ = case(12, 40, 8)
    logprob, rank = ops.target_logprob_and_rank(
        hidden.reshape(3, 4, 8).requires_grad_(), items, target.reshape(3, 4), backend=backend
    )
    assert logprob.shape == rank.shape == (3, 4)
    assert rank.dtype == torch.int64
    assert not rank.requires_grad
    logprob.sum().backward()


@needs_native
class TestDeterminism:
    def test_threads(self):
        hidden, items, target, grad = case(300, 9000, 20)
        one = _native.target_logprob(hidden, items, target, ties="order", threads=1)
        gradients = _native.target_logprob_backward(grad, hidden, items, target, one[2], threads=1)
        for threads in (2, 3, 16):
            again = _native.target_logprob(hidden, items, target, ties="order", threads=threads)
            assert all(map(torch.equal, one, again))
            more = _native.target_logprob_backward(grad, hidden, items, target, one[2], threads=threads)
            assert all(map(torch.equal, gradients, more))

    def test_rows_do_not_depend_on_the_batch(self):
        hidden, items, target, grad = case(300, 2500, 20)
        logprob, rank, lse = _native.target_logprob(hidden, items, target, ties="order")
        d_hidden = _native.target_logprob_backward(grad, hidden, items, target, lse)[0]
        for size in (1, 2, 7, 299):
            for rows in torch.arange(300).split(size)[:5]:
                part = _native.target_logprob(hidden[rows], items, target[rows], ties="order")
                assert all(map(torch.equal, part, (logprob[rows], rank[rows], lse[rows])))
                own = _native.target_logprob_backward(grad[rows], hidden[rows], items, target[rows], lse[rows])[0]
                assert torch.equal(own, d_hidden[rows])

    def test_many_python_threads_at_once(self):
        hidden, items, target, grad = case(64, 5000, 16)
        expected, results = self.work(hidden, items, target, grad), []
        workers = [threading.Thread(target=lambda: results.append(self.work(hidden, items, target, grad))) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(results) == 4
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))

    def test_after_a_fork(self):
        arguments = case(64, 5000, 16)
        expected = self.work(*arguments)
        context = multiprocessing.get_context("fork")
        answer = context.SimpleQueue()
        child = context.Process(target=lambda: answer.put([x.numpy() for x in self.work(*arguments)]))
        child.start()
        found = answer.get()
        child.join(60)
        assert child.exitcode == 0
        assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(found, expected, strict=True))

    @staticmethod
    def work(hidden, items, target, grad):
        logprob, _, lse = _native.target_logprob(hidden, items, target, threads=2)
        return [logprob, *_native.target_logprob_backward(grad, hidden, items, target, lse, threads=2)]


def test_infinities_and_nan(backend):
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    items = torch.tensor([[1.0, 1.0], [2.0, 0.0], [torch.inf, 3.0], [-torch.inf, 0.0]])
    for target in range(4):
        scores = torch.stack([(row * items).sum(1) for row in hidden])
        scores[0], scores[1] = torch.tensor([1.0, 2.0, torch.inf, -torch.inf]), torch.nan
        expected = scores[:, target] - scores.logsumexp(1)
        found = ops.target_logprob(hidden, items, torch.full((3,), target), backend=backend)
        expected[1] = torch.nan
        torch.testing.assert_close(found, expected, equal_nan=True)
    minus = torch.tensor([[1.0], [-torch.inf], [2.0]])
    found = ops.target_logprob(torch.ones(3, 1), minus, torch.tensor([0, 1, 2]), backend=backend)
    torch.testing.assert_close(found, torch.tensor([1.0, -torch.inf, 2.0]) - torch.tensor([1.0, 2.0]).logsumexp(0))
    assert ops.target_logprob(torch.ones(1, 1), minus[1:2].repeat(30, 1), torch.tensor([3]), backend=backend).isnan()


def test_a_row_that_is_not_finite_spoils_the_gradients(backend):
    hidden, items, target, grad = case(6, 40, 4)
    hidden[2, 1] = torch.nan
    _, gradients = run(ops.target_logprob, hidden, items, target, grad, backend=backend)
    assert gradients["hidden"].isnan().any(1).tolist() == [False, False, True, False, False, False]
    assert gradients["items"].isnan().all()


def test_no_rows(backend):
    hidden, items = torch.empty(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64)
    losses = {r: ops.linear_cross_entropy(hidden, items, target, reduction=r, backend=backend) for r in ("none", "mean", "sum")}
    assert losses["none"].shape == (0,)
    assert losses["mean"].isnan()
    assert losses["sum"] == 0
    losses["sum"].backward()
    assert not items.grad.any()


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_argument(which, backend):
    hidden, items, target, grad = case(20, 90, 8)
    both = run(ops.target_logprob, hidden, items, target, grad, backend=backend)[1]
    arguments = [hidden, items]
    arguments[which] = arguments[which].clone().requires_grad_()
    ops.target_logprob(*arguments, target, backend=backend).backward(grad)
    assert torch.equal(arguments[which].grad, list(both.values())[which])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_run_in_pieces(dtype, monkeypatch):
    monkeypatch.setattr(ops._chunked_softmax, "_SCORES", 1)
    hidden, items, target, grad = case(20, 3000, 16, size=0.3)
    hidden, items, grad = hidden.to(dtype), items.to(dtype), grad.to(dtype)
    if dtype != torch.float64:
        check("target_logprob", hidden, items, target, grad, backend="reference")
        return
    for ours, theirs in zip(
        run(ops.target_logprob, hidden, items, target, grad),
        run(reference.target_logprob, hidden, items, target, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_opcheck(backend):
    hidden, items, target, grad = case(5, 30, 8)
    hidden.requires_grad_(), items.requires_grad_()
    for ties in (None, "order"):
        torch.library.opcheck(torch.ops.lares_fast.target_logprob, (hidden, items, target, 0.5, False, ties, backend))
    lse = _lse(hidden.detach(), items.detach())
    arguments = (grad, hidden.detach(), items.detach(), target, lse, 1.0, False, True, False, backend)
    torch.library.opcheck(torch.ops.lares_fast.target_logprob_backward, arguments)


def _lse(hidden, items):
    return (hidden.double() @ items.double().T).logsumexp(1)


def test_compile(backend):
    hidden, items, target, grad = case(5, 30, 8)

    def loss(hidden, items, target):
        logprob, rank = ops.target_logprob_and_rank(hidden, items, target, backend=backend)
        return logprob * 2 + rank

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(run(compiled, hidden, items, target, grad), run(loss, hidden, items, target, grad), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_second_derivatives_are_refused(backend):
    hidden, items, target, _ = case(5, 30, 8)
    loss = ops.linear_cross_entropy(hidden.requires_grad_(), items, target, backend=backend)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="The gradient of target_logprob has no gradient: for second derivatives use"):
        gradient.sum().backward()


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden": torch.ones(2, 3).long()}, "hidden must be a floating-point"),
    ({"hidden": [[1.0]]}, "hidden must be a dense tensor, but got list"),
    ({"hidden": torch.tensor(1.0)}, r"hidden must be a floating-point \[\.\.\., D\]"),
    ({"items": torch.ones(5, 4)}, r"items must be \[N, 3\] like hidden"),
    ({"items": torch.ones(0, 3)}, "with at least 1 row, but got"),
    ({"items": torch.ones(1, 3), "skip_pad": True}, "with at least 2 rows with skip_pad, but got"),
    ({"items": torch.ones(5, 3).double()}, r"items must be torch\.float32 on cpu like hidden"),
    ({"items": torch.ones(5, 3, device="meta")}, "on cpu like hidden, but got .* on meta"),
    ({"target": torch.tensor([1])}, r"target must be torch\.int64 \[2\]"),
    ({"target": torch.tensor([1.0, 2.0])}, r"target must be torch\.int64 \[2\] .* but got torch\.float32"),
    ({"target": torch.tensor([1, 5])}, r"target must be in 0\.\.4, but it spans 1\.\.5"),
    ({"target": torch.tensor([-1, 1])}, r"target must be in 0\.\.4, but it spans -1\.\.1"),
    ({"target": torch.tensor([0, 1]), "skip_pad": True}, r"target must be in 1\.\.4, but it spans 0\.\.1"),
    ({"scale": 0.0}, "scale must be a positive number"),
    ({"scale": float("nan")}, "scale must be a positive number"),
    ({"reduction": "max"}, "reduction must be one of none, mean, sum, but got 'max'"),
    ({"backend": "fast"}, "backend must be one of"),
])  # fmt: skip
def test_bad_arguments(change, message):
    arguments = {"hidden": torch.ones(2, 3), "items": torch.ones(5, 3), "target": torch.tensor([1, 2]), **change}
    with pytest.raises(InputError, match=message):
        ops.linear_cross_entropy(arguments.pop("hidden"), arguments.pop("items"), arguments.pop("target"), **arguments)


def test_bad_ties_and_backend():
    hidden, items, target, _ = case(2, 5, 3)
    with pytest.raises(InputError, match="ties must be one of order, strict, but got 'id'"):
        ops.target_logprob_and_rank(hidden, items, target, ties="id")
    with pytest.raises(
        BackendError, match=r"cannot run on the backend 'native': it takes float32, and hidden is torch\.float64"
    ):
        ops.target_logprob(hidden.double(), items.double(), target, backend="native")


class TestLosses:
    """The training losses of the model users build, by the law against the reference's."""

    N, L, B = 60, 10, 24

    def losses(self, kind, similarity, phase, scores="dot"):
        torch.manual_seed(3)
        config = LARESConfig.preset("tiny", n_items=self.N, dropout=0.0, similarity=similarity, tau=0.2)
        weights = {k: v.double() for k, v in reference.LARES(config).state_dict().items()}
        frozen_weights = {k: v + 0.02 * torch.randn(v.shape, dtype=v.dtype) for k, v in weights.items()}
        lengths = torch.randint(1, self.L + 1, (self.B,))
        seq = torch.where(torch.arange(self.L) < lengths[:, None], torch.randint(1, self.N, (self.B, self.L)), 0)
        target = torch.randint(1, self.N, (self.B,))
        make, dtype = kind

        def build(values):
            module = make(config).train()
            module.load_state_dict(values)
            return module.to(dtype)

        trained = build(weights)
        passes = [reference.Pass(T, Draw((1, i), torch.arange(self.B))) for i, T in enumerate((2, 3, 3))]
        if phase == "spt":
            loss = reference.spt_loss(
                trained, (seq, lengths), target, (seq, lengths), tuple(passes), 1, alpha=0.1, gamma=0.5
            ).total
        else:
            frozen = build(frozen_weights).eval().requires_grad_(False)
            depth = torch.tensor([2, 3, 3])[:, None].expand(-1, self.B)
            group = reference.Pass(depth, Draw((1, 0), torch.arange(3 * self.B)))
            loss = reference.rpt_loss(
                trained, frozen, (seq, lengths), target, group, group, k=10, beta=1.0, reward="ndcg", scores=scores
            ).total
        loss.backward()
        return {"loss": loss.detach()}, {name: p.grad for name, p in trained.named_parameters()}

    @pytest.mark.parametrize("similarity", ["dot", "cos"])
    @pytest.mark.parametrize("objective", [("spt",), ("rpt", "dot"), ("rpt", "model")])
    def test_gradients(self, similarity, objective):
        truth = self.losses((reference.LARES, torch.float64), similarity, *objective)
        twin = self.losses((reference.LARES, torch.float32), similarity, *objective)
        before = sum(_dispatch.calls["linear_cross_entropy", b] for b in ("native", "reference"))
        result = self.losses((model.LARES, torch.float32), similarity, *objective)
        assert sum(_dispatch.calls["linear_cross_entropy", b] for b in ("native", "reference")) > before
        oracle.check("gradient", result[1], twin[1], truth[1])
        oracle.check("forward", result[0], twin[0], truth[0])
