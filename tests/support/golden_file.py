"""A golden file with numbers of the official code, and checks of a model against it. See tests/golden/README.md."""

import json

import numpy as np
import torch

from lares_fast import convert
from lares_fast.reference import LARES, Pass, rpt_loss, spt_loss, target_logprob


class Golden:
    model_class = LARES

    def __init__(self, path):
        with np.load(path, allow_pickle=False) as archive:
            self.values = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "config"}
            self.settings = json.loads(archive["config"].tobytes())
        self.config = convert.config_from_official(self.settings, self.group("policy."))
        self.sequences = (self["item_seq"], self["item_seq_len"])

    def __getitem__(self, name):
        return self.values[name]

    def group(self, prefix):
        return {name.removeprefix(prefix): value for name, value in self.values.items() if name.startswith(prefix)}

    def model(self, role):
        model = self.model_class(self.config)
        model.load_state_dict(convert.from_official(self.group(f"{role}."), self.config))
        return model.train(role == "policy")

    def passes(self, prefix, depths):
        return [Pass(int(T), state=self[f"{prefix}{i}"]) for i, T in enumerate(depths)]

    def group_pass(self, prefix, depths):
        """Return the passes of phase 2 as one :class:`Pass`."""
        states = [self[f"{prefix}{i}"] for i in range(len(depths))]
        return Pass(depths[:, None].expand(-1, len(states[0])), state=torch.cat(states))


def assert_close(name, ours, official):
    scale = official.abs().max()
    error = (ours - official).abs().max()
    assert error <= 1e-5 * scale + 1e-6, f"{name}: error {error:.2e} at scale {scale:.2e}"


def assert_gradients(model, loss, official):
    """Check |g - g*| <= 1e-4 |g*| + 1e-7 |all gradients of the loss| for each tensor, the rule of golden/README.md."""
    loss.backward()
    ours = convert.to_official({name: p.grad for name, p in model.named_parameters()}, model.config)
    assert set(ours) == set(official)
    overall = torch.cat([g.flatten() for g in official.values()]).norm()
    for name, expected in official.items():
        error, bound = (ours[name] - expected).norm(), 1e-4 * expected.norm() + 1e-7 * overall
        assert error <= bound, f"gradient of {name}: error {error:.3e} > {bound:.3e}"


def check_forward(golden):
    model = golden.model("policy")
    h0, T = golden["forward.h0"], int(golden["forward.num_steps"])
    states = model.encode(*golden.sequences, num_steps=T, state=h0, return_all_steps=True)
    assert_close("all_outputs", states, golden["forward.all_outputs"])
    assert_close("last_output", model.encode(*golden.sequences, num_steps=T, state=h0), golden["forward.last_output"])


def check_logprobs(golden):
    model = golden.model("policy")
    states = model.encode(
        *golden.sequences, num_steps=int(golden["forward.num_steps"]), state=golden["forward.h0"], return_all_steps=True
    )
    items = model.item_embedding.weight
    for target in range(golden.config.n_items):
        logprob = target_logprob(states, items, torch.full(states.shape[:2], target))
        assert_close(f"log p({target})", logprob, golden["forward.per_step_logps"][..., target])


def check_scores(golden):
    model = golden.model("policy")
    T = int(golden["forward.scores_num_steps"])
    queries = model.queries(model.encode(*golden.sequences, num_steps=T, state=golden["forward.h0"]))
    assert_close("scores", queries @ model.item_table().T, golden["forward.scores"])


def check_spt(golden):
    model = golden.model("policy")
    depths = (golden["spt.T_ce"], golden["spt.T_shared"], golden["spt.T_shared"])
    loss = spt_loss(
        model,
        golden.sequences,
        golden["pos_items"],
        (golden["aug_item_seq"], golden["aug_item_seq_len"]),
        tuple(golden.passes("spt.h0_", depths)),
        int(golden["spt.step_index"]),
        alpha=golden.settings["alpha"],
        gamma=golden.settings["gamma"],
    )
    assert_close("loss", loss.total, golden["spt.loss"])
    assert_gradients(model, loss.total, golden.group("spt.grad."))


def check_rpt(golden, reward):
    policy = golden.model("policy")
    depths = golden["rpt.T"]
    loss = rpt_loss(
        policy,
        golden.model("reference"),
        golden.sequences,
        golden["pos_items"],
        golden.group_pass("rpt.h0_policy_", depths),
        golden.group_pass("rpt.h0_reference_", depths),
        k=int(golden["rpt.k"]),
        beta=float(golden["rpt.beta"]),
        reward=reward,
    )
    rewards, expected = float(loss.rewards.sum()), float(golden[f"rpt.{reward}.reward_sum"])
    tolerance = 0 if reward == "recall" else 1e-5 * expected
    assert abs(rewards - expected) <= tolerance, f"rewards sum to {rewards} instead of {expected}"
    assert_close("loss", loss.total, golden[f"rpt.{reward}.loss"])
    assert_gradients(policy, loss.total, golden.group(f"rpt.{reward}.grad."))
