"""A diverged model is never saved, chosen or exported, and the run can be resumed from the state before it."""

from dataclasses import replace

import pytest
import torch

from lares_fast import LARES, LARESConfig, serve
from lares_fast._errors import InputError
from lares_fast._finite import NotFiniteError, all_finite, largest
from lares_fast._weights import load_weights
from lares_fast.train import Interrupted, Trainer, model_ranks
from lares_fast.train.checkpoint import load_state
from lares_fast.train.evaluate import keep_rankable
from lares_fast.train.keys import evaluation_key
from lares_fast.train.spt import SPT
from tests.support import train_run


def trainer(out, emit=lambda _: None, checkpoint_minutes=10.0, **phases):
    config = train_run.config(spt_epochs=1, rpt_epochs=1, checkpoint_minutes=checkpoint_minutes)
    config = replace(config, **{name: replace(getattr(config, name), **changes) for name, changes in phases.items()})
    return Trainer(config, train_run.log(), train_run.split(), out, emit)


def assert_sound(out):
    state = load_state(out / "state.pt")
    for part in ("model", "best", "start"):
        assert all_finite((state[part] or {}).values())
    assert largest(state["model"].values()) < 1e3


@pytest.mark.parametrize("minutes", [10.0, 0.0])
@pytest.mark.parametrize(("lr", "size"), [(1e30, 64), (1e30, 100_000), (1e19, 64), (1e37, 100_000)])
def test_a_learning_rate_far_too_high(tmp_path, lr, size, minutes):
    """The run diverges in each phase, in an epoch or at its end, with and without checkpoints after each step."""
    for phase in ("spt", "rpt"):
        before = load_weights(tmp_path / "model.safetensors")[0] if phase == "rpt" else None
        with pytest.raises(InputError, match=rf"lower {phase}\.lr and resume"):
            trainer(tmp_path, checkpoint_minutes=minutes, **{phase: {"lr": lr, "batch_size": size}}).run((phase,))
        assert_sound(tmp_path)
        if before is None:
            assert not (tmp_path / "model.safetensors").exists()
        else:
            after = load_weights(tmp_path / "model.safetensors")[0]
            assert all(torch.equal(after[name], value) for name, value in before.items())
        # The remedy works.
        trainer(tmp_path).run((phase,))
    serve.load(tmp_path).recommend([train_run.log().item_ids[train_run.log().history(0)].tolist()])


def test_nothing_reaches_the_weights_when_the_loss_or_its_gradient_is_not_finite(tmp_path, monkeypatch):
    whole = SPT.forward

    def forward(harm):
        def of_batch(self, batch):
            value = whole(self, batch)
            count.append(0)
            return harm(value) if len(count) == 3 else value

        return of_batch

    harms = {
        "nan loss": lambda value: value * torch.nan,
        "inf loss": lambda value: value + torch.inf,
        "nan gradient": lambda value: value + (value - value.detach()).abs().sqrt() * 1e-3,
        "huge gradient": lambda value: value * 1e30 - value.detach() * 1e30 + value.detach(),
    }
    for name, harm in harms.items():
        count = []
        monkeypatch.setattr(SPT, "forward", forward(harm))
        run = trainer(tmp_path / name, spt={"batch_size": 64})
        with pytest.raises(NotFiniteError, match=r"after 2 of its steps: lower spt\.lr"):
            run.run(("spt",))
        assert run.state.progress.step == 2 and all_finite(run.model.state_dict().values())
        assert_sound(tmp_path / name)


def test_a_decay_that_breaks_the_moments_is_not_saved(tmp_path):
    with pytest.raises(NotFiniteError, match=r"lower spt\.lr or spt\.weight_decay"):
        trainer(tmp_path, spt={"weight_decay": 1e36}).run(("spt",))
    assert_sound(tmp_path)


def test_a_stop_does_not_save_what_is_not_finite(tmp_path):
    run = trainer(tmp_path, emit=lambda event: event["event"] == "step" and (harm(), run.request_stop()))

    def harm():
        with torch.no_grad():
            run.model.input_norm.bias.fill_(torch.nan)

    with pytest.raises(NotFiniteError):
        run.run(("spt",))
    assert_sound(tmp_path)
    assert load_state(tmp_path / "state.pt")["step"] == 0


def test_a_model_that_cannot_be_scored_at_all_names_the_setting(tmp_path):
    with pytest.raises(NotFiniteError, match=r"model\.tau may be too small"):
        train_run.train(tmp_path, model={"similarity": "cos", "tau": 1e-30})
    assert_sound(tmp_path)


def test_a_bad_phase_1_model_is_not_blamed_on_phase_2(tmp_path):
    with pytest.raises(NotFiniteError, match=r"begin a new run with a lower spt\.lr"):
        trainer(tmp_path, spt={"lr": 1e4}).run(train_run.BOTH)


def test_a_state_that_was_saved_with_nan_is_refused(tmp_path):
    from lares_fast.train.checkpoint import save_state

    trainer(tmp_path).run(("spt",))
    state = load_state(tmp_path / "state.pt")
    state["optimizer"]["state"][0]["exp_avg_sq"].fill_(torch.inf)
    save_state(tmp_path / "state.pt", state)
    with pytest.raises(InputError, match="not finite: begin a new run"):
        trainer(tmp_path)


@pytest.fixture(params=["dot", "cos"])
def model(request):
    torch.manual_seed(0)
    config = {**train_run.MODEL, "n_items": train_run.log().n_items, "similarity": request.param}
    return LARES(LARESConfig.from_dict(config))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("item_embedding.weight", torch.nan),
        ("item_embedding.weight", torch.inf),
        ("item_embedding.weight", 1e20),
        ("input_norm.bias", torch.nan),
        ("input_norm.weight", 1e30),
        ("position_embedding.weight", -torch.inf),
    ],
)
def test_ranks_of_a_broken_model_are_refused(model, name, value):
    """One broken number is enough, even if all scores are finite by chance."""
    log, rows = train_run.log(), train_run.split().valid
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    with pytest.raises(NotFiniteError, match="not finite"):
        model_ranks(model, log, rows, key=evaluation_key(0))
    with pytest.raises(NotFiniteError, match="not finite"):
        keep_rankable(model, log, rows, key_of_pass=evaluation_key, passes=1, top=5)
    with pytest.raises(NotFiniteError, match="not finite"):
        serve.Recommender(model, log.item_ids.tolist())


def test_queries_that_overflow_are_refused_though_all_weights_are_sound(model, monkeypatch):
    log, rows = train_run.log(), train_run.split().valid
    recommender = serve.Recommender(model, log.item_ids.tolist())
    queries = type(model).queries
    for value in (torch.nan, torch.inf, 3e38):

        def broken(self, hidden, value=value):
            query = queries(self, hidden).clone()
            query[-1, 0] = value
            return query

        with monkeypatch.context() as patch:
            patch.setattr(type(model), "queries", broken)
            with pytest.raises(NotFiniteError):
                model_ranks(model, log, rows, key=evaluation_key(0))
            with pytest.raises(NotFiniteError):
                recommender.recommend([log.item_ids[log.history(0)].tolist()])
            with pytest.raises(NotFiniteError):
                recommender.encode([log.item_ids[log.history(0)].tolist()])


def test_a_stop_at_the_first_step_still_saves(tmp_path):
    """The state that is written before the first step is replaced when the run stops."""
    stop = train_run.Stop("step", 1)
    with pytest.raises(Interrupted):
        train_run.train(tmp_path, ("spt",), stop=stop)
    assert load_state(tmp_path / "state.pt")["step"] == 1
