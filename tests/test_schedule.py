"""schedule.py against values computed by hand and torch's own warm restarts."""
import math
import random

import pytest
import torch

from common.schedule import learning_rate

# name: (options, learning rate of every step); options not given are BASE's
BASE = dict(num_steps=10, lr=1.0, min_lr=0.1)
EIGHTHS = [0.1 + 0.45 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 9)]     # half a cosine
TABLES = {
    "cosine after a warm-up from initial_lr": (
        dict(kind="cosine", warmup_steps=2, initial_lr=0.2), [0.6, 1.0, *EIGHTHS]),
    "cosine without a warm-up": (
        dict(kind="cosine", num_steps=4), [0.8681981, 0.55, 0.2318019, 0.1]),
    "restarts, each period twice as long": (
        dict(kind="restarts", num_steps=8, min_lr=0.0, warmup_steps=1, period=2, period_mul=2.0),
        [1.0, 0.5, 0.0, 0.8535534, 0.5, 0.1464466, 0.0, 0.9619398]),           # periods of 2, 4, 8
    "restarts, equal periods": (
        dict(kind="restarts", num_steps=6, min_lr=0.0, period=2), [0.5, 0.0, 0.5, 0.0, 0.5, 0.0]),
    "restarts, periods of 2, 3 and 4 (4.5 rounded)": (
        dict(kind="restarts", num_steps=9, min_lr=0.0, period=2, period_mul=1.5),
        [0.5, 0.0, 0.75, 0.25, 0.0, 0.8535534, 0.5, 0.1464466, 0.0]),
    "restarts without a period are one cosine": (
        dict(kind="restarts", warmup_steps=2), [0.5, 1.0, *EIGHTHS]),
    "constant after a warm-up": (
        dict(kind="constant", warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
    "constant from the start": (
        dict(kind="constant"), [1.0] * 10),
    "wsd": (
        dict(kind="wsd", warmup_steps=2, decay_frac=0.4), [0.5, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1]),
    "wsd that decays in the last step only": (
        dict(kind="wsd", decay_frac=0.1), [1.0] * 9 + [0.1]),
}


@pytest.mark.parametrize("name", TABLES)
def test_schedule_equals_the_table_computed_by_hand(name):
    options, table = TABLES[name]
    options = {**BASE, **options}
    lrs = [learning_rate(step=step, **options) for step in range(options["num_steps"])]
    assert lrs == pytest.approx(table)


@pytest.mark.parametrize("kind", ["cosine", "restarts", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [1, 3])
def test_warm_up_starts_above_initial_lr_and_reaches_lr_in_its_last_step(kind, warmup):
    lrs = [learning_rate(kind, step, 20, 3e-4, 3e-5, warmup, initial_lr=1e-5) for step in range(20)]
    assert lrs[0] == pytest.approx(1e-5 + (3e-4 - 1e-5) / warmup)
    assert lrs[warmup - 1] == pytest.approx(3e-4) and lrs[warmup] <= 3e-4
    assert lrs[19] == pytest.approx(3e-4 if kind == "constant" else 3e-5)


def test_restarts_equal_those_of_torch_one_update_later():
    # torch counts updates done before the step, we count this one too; at a period's end it jumps to
    # lr where we close with min_lr
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3, T_mult=2, eta_min=0.1)
    restarts = 0
    for step in range(40):
        optimizer.step()
        scheduler.step()
        ours = learning_rate("restarts", step, 40, 1.0, 0.1, period=3, period_mul=2)
        theirs = optimizer.param_groups[0]["lr"]
        if theirs == 1.0:
            restarts += 1
            assert ours == pytest.approx(0.1)
        else:
            assert ours == pytest.approx(theirs)
    assert restarts == 3                                                         # after 3, 9, 21 updates


@pytest.mark.parametrize("name", TABLES)
def test_schedule_is_a_pure_function_of_the_step(name):
    options = {**BASE, **TABLES[name][0]}
    in_order = [learning_rate(step=step, **options) for step in range(options["num_steps"])]
    shuffled = random.Random(0).sample(range(options["num_steps"]), options["num_steps"])
    assert {step: learning_rate(step=step, **options) for step in shuffled} == dict(enumerate(in_order))


def test_an_unknown_kind_is_refused_and_not_taken_for_a_constant():
    with pytest.raises(ValueError, match="cosin"):
        learning_rate("cosin", 5, **BASE)
