"""The phases are modules: a plain loop over them gives the bits of the trainer, and they use the ops."""

import copy
import threading
from dataclasses import replace

import pytest
import torch

import lares_fast
from lares_fast import LARESConfig, _dispatch, ops, reference
from lares_fast._errors import InputError
from lares_fast._random import Draw, root_key
from lares_fast.data import Rows, epoch_order, make_batch
from lares_fast.reference.backbone import BACKBONES
from lares_fast.train import RPT, SPT, RPTConfig, SPTConfig, Trainer, keys
from lares_fast.train.checkpoint import load_state
from tests.support import train_run
from tests.support.catalog_cases import BACKENDS


def model_of(log):
    torch.manual_seed(0)
    return lares_fast.LARES(LARESConfig(n_items=log.n_items, **train_run.MODEL))


def phase_of(name, model):
    log, rows = train_run.log(), train_run.split().train
    if name == "spt":
        return SPT(model, log, rows, SPTConfig(batch_size=128))
    return RPT(model, copy.deepcopy(model), log, rows, RPTConfig(batch_size=128, group_size=2))


@pytest.mark.parametrize("name", ["spt", "rpt"])
def test_a_plain_loop_gives_the_bits_of_the_trainer(name, tmp_path):
    """The loop uses the keys, the order of rows and the optimizer of the trainer, but not its code."""
    settings = {"spt_epochs": 1, "rpt_epochs": 1}
    train_run.train(tmp_path, ("spt",) if name == "spt" else train_run.BOTH, **settings)
    state, config = load_state(tmp_path / "state.pt"), train_run.config(**settings)
    model = model_of(train_run.log())
    if name == "spt":
        with torch.random.fork_rng():
            torch.manual_seed(keys.initial_weights_seed(root_key(config.seed)))
            model = lares_fast.LARES(model.config)
        phase = SPT(model, train_run.log(), train_run.split().train, config.spt)
    else:
        model.load_state_dict(state["start"])
        rows = Rows(state["kept"]["users"].numpy(), state["kept"]["ends"].numpy())
        phase = RPT(model, copy.deepcopy(model), train_run.log(), rows, config.rpt)
    optimizer = torch.optim.Adam(model.parameters(), lr=phase.settings.lr)
    epoch = keys.epoch_key(keys.phase_key(root_key(config.seed), name, restarts=0), 0)
    phase.train()
    order = epoch_order(len(phase.rows), keys.order_key(epoch))
    for step, index in enumerate(order.split(phase.settings.batch_size)):
        loss = phase(phase.batch(index, keys.step_key(epoch, step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(value, state["model"][name]) for name, value in model.state_dict().items())


def test_other_threads_do_not_change_the_initial_weights(tmp_path, monkeypatch):
    """Another thread builds a model of another seed, and draws numbers, while a block of this model is built."""
    others = []

    def trainer(seed, backbone):
        config = replace(train_run.config(model={"backbone": backbone}), seed=seed)
        return Trainer(config, train_run.log(), train_run.split(), tmp_path / f"{backbone}-{seed}")

    def disturb():
        others.append((trainer(8, "transformer").model.state_dict(), torch.rand(3)))

    def disturbed(config, n_layers):
        thread = threading.Thread(target=disturb)
        thread.start()
        thread.join()
        return BACKBONES["transformer"](config, n_layers)

    monkeypatch.setitem(BACKBONES, "disturbed", disturbed)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = trainer(7, "disturbed").model.state_dict()
        drawn = torch.rand(3)
        torch.manual_seed(1)
        shared = torch.rand(9).split(3)
    for seed, weights in ((7, found), *((8, weights) for weights, _ in others)):
        with torch.random.fork_rng():
            torch.manual_seed(keys.initial_weights_seed(root_key(seed)))
            expected = lares_fast.LARES(LARESConfig(n_items=train_run.log().n_items, **train_run.MODEL)).state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in expected.items())
    # Only the draws of the program read the generator that threads share: two blocks, and then this thread.
    assert torch.equal(torch.stack((others[0][1], others[1][1], drawn)), torch.stack(shared))


@pytest.mark.parametrize("name", ["spt", "rpt"])
def test_the_loss_depends_on_the_key_alone(name):
    phase = phase_of(name, model_of(train_run.log())).train()
    index = torch.arange(100)

    def loss(key):
        batch = phase.batch(index, key)
        assert len(batch) == 100
        # The batch holds all random choices, so a second forward gives the same bits.
        first, parts = phase(batch), phase.parts
        assert first.requires_grad and not any(value.requires_grad or value.dim() for value in parts.values())
        assert torch.equal(first, phase(batch))
        return first.item()

    torch.manual_seed(1)
    one = loss((3, 4))
    torch.manual_seed(2)
    assert loss((3, 4)) == one != loss((3, 5))


@pytest.mark.parametrize(("name", "passes"), [("spt", 1), ("rpt", 2)])
def test_every_pass_of_every_step_has_its_own_random_numbers(name, passes):
    phase = phase_of(name, model_of(train_run.log()))
    batches = [phase.batch(torch.arange(10), key) for key in ((3, 4), (3, 5))]
    drawn = [
        each for batch in batches for each in ((batch.choices,) if name == "spt" else (batch.policy_pass, batch.start_pass))
    ]
    assert len({each.draw.key for each in drawn}) == 2 * passes
    for each in drawn:
        assert len(each.draw.rows.unique()) == each.num_steps.numel()


@pytest.mark.parametrize("name", ["spt", "rpt"])
def test_a_batch_goes_to_a_device_with_its_rows_and_tables_only(name):
    batch = phase_of(name, model_of(train_run.log())).batch(torch.arange(10), root_key(1))
    moved = batch.to("meta")
    assert moved.inputs.items.device.type == moved.inputs.target.device.type == "meta" and len(moved) == 10
    assert {table.device.type for table in moved.rows} == {"meta"}
    assert batch.inputs.items.device.type == batch.rows[0].device.type == "cpu"
    if name == "spt":
        assert moved.choices is batch.choices
    else:
        assert moved.policy_pass is batch.policy_pass and moved.start_pass is batch.start_pass


@pytest.mark.parametrize(("alpha", "gamma"), [(0.1, 0.5), (0.1, 0.0), (0.0, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("mean_depth", [1, 3])
def test_the_packed_passes_of_phase_1_give_the_loss_of_the_reference(alpha, gamma, each, mean_depth):
    """The reference runs three passes, one after the other. The dropout masks are equal, because their rows are."""
    log, rows, size = train_run.log(), train_run.split().train, 40
    sampling = {"mean_depth": mean_depth, "depth_sampling": "uniform" if mean_depth > 1 else "constant"}
    config = LARESConfig(n_items=log.n_items, **{**train_run.MODEL, **sampling}, per_sequence_depth=each)
    torch.manual_seed(0)
    model = lares_fast.LARES(config)
    phase = SPT(model, log, rows, SPTConfig(alpha=alpha, gamma=gamma)).train()
    batch = phase.batch(torch.arange(size), (3, 4))
    packed, draw = batch.inputs, batch.choices.draw
    passes = len(packed) // size
    assert passes == (3 if alpha else 2 if gamma else 1)
    depths = batch.choices.num_steps.view(passes, size)
    # A pass that does not count may be any pass.
    parts = [min(number, passes - 1) for number in range(3)]
    sequences = [
        make_batch(log, rows, packed.rows[size * part : size * (part + 1)], config.max_len).sequences for part in parts
    ]
    three = [reference.Pass(depths[part], Draw(draw.key, draw.rows[size * part : size * (part + 1)])) for part in parts]
    step_index = (
        int((batch.rows.chosen[passes * size :] - batch.rows.chosen[size : 2 * size] + depths[1] - 1).max()) if gamma else 0
    )
    with ops.backend("reference"):
        expected = reference.spt_loss(
            model, sequences[0], packed.target[:size], sequences[2], tuple(three), step_index, alpha=alpha, gamma=gamma
        )
        total = phase(batch)
    torch.testing.assert_close(total, expected.total)
    torch.testing.assert_close(phase.parts["step"], expected.step.detach())
    parameters = list(model.parameters())
    found, wanted = (torch.autograd.grad(loss, parameters) for loss in (total, expected.total))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_phase_trains_the_parameters_of_its_model_and_sets_its_dropout():
    model = model_of(train_run.log())
    assert set(phase_of("spt", model).parameters()) == set(model.parameters())
    phase = phase_of("rpt", model)
    assert (model.config.dropout, phase.start.config.dropout) == (0.1, 0.5)
    trained = [value for value in phase.parameters() if value.requires_grad]
    assert set(trained) == set(model.parameters())


def test_the_start_model_stays_frozen_and_in_evaluation_mode():
    model = model_of(train_run.log())
    phase = phase_of("rpt", model)
    before = {name: value.clone() for name, value in phase.start.state_dict().items()}
    for mode in (True, False, True):
        phase.train(mode)
        assert model.training is mode and not any(module.training for module in phase.start.modules())
    loss = phase(phase.batch(torch.arange(50), root_key(1)))
    loss.backward()
    assert all(value.grad is None for value in phase.start.parameters())
    assert all(torch.equal(value, before[name]) for name, value in phase.start.state_dict().items())


def test_a_phase_without_rows_is_refused():
    log, rows = train_run.log(), train_run.split().train
    with pytest.raises(InputError, match="rows must hold a training row"):
        SPT(model_of(log), log, Rows(rows.users[:0], rows.ends[:0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reward_ranks_on_the_op(backend):
    log, rows = train_run.log(), train_run.split().valid
    model = lares_fast.LARES(LARESConfig(n_items=log.n_items, **train_run.MODEL))
    torch.nn.init.normal_(model.item_embedding.weight)
    phase = RPT(model, copy.deepcopy(model), log, rows, RPTConfig(batch_size=30, group_size=3, k=20))
    batch = phase.batch(torch.arange(30), root_key(2))
    with ops.backend("reference"):
        expected = phase(batch)
    with ops.backend(backend):
        before = _dispatch.calls["linear_cross_entropy", backend]
        loss, parts = phase(batch), phase.parts
        after = _dispatch.calls["linear_cross_entropy", backend]
    assert after == before + 2, "one call for the model, with ranks of the last steps, and one for the start model"
    torch.testing.assert_close(loss, expected)
    assert parts["reward"] > 0
    loss.backward()
    assert model.item_embedding.weight.grad.abs().sum() > 0
