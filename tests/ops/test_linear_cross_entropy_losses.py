"""The training losses of the model that users build, by the tolerances against the losses of the reference."""

import pytest
import torch

from lares_fast import LARESConfig, _dispatch, model, reference
from lares_fast._random import Draw
from tests.support import oracle


class TestLosses:
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
