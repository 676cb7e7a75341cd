"""What changes with the step: learning rate, weight of total variation, which network learns, clipping of gradients.

Run: pytest tests/test_schedule.py
"""

import functools

import pytest
import torch
from test_trainer import batch, build, changed, run, snapshot

from autopainter import config, schedule
from autopainter.errors import UserError
from autopainter.trainer import SCALARS


@pytest.fixture
def make(feature_weights):
    return lambda *overrides: build(feature_weights, "telemetry.log_every_steps=3", *overrides)


def settings(*overrides):
    fixed = ["run.name=a", "run.storage=unused", "data.manifest=unused", "loss.feature_weight=0", "train.steps=12"]
    return config.load(None, [*fixed, "telemetry.log_every_steps=12", *overrides], environment={})


# The learning rate


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), [1.0] * 12),
        (("train.warmup_steps=4",), [0.25, 0.5, 0.75, *[1.0] * 9]),
        (("train.decay_from=8",), [*[1.0] * 8, 1.0, 0.75, 0.5, 0.25]),
        (("train.warmup_steps=2", "train.decay_from=10"), [0.5, *[1.0] * 10, 0.5]),
        (("train.warmup_steps=12", "train.decay_from=6"), [(s + 1) / 12 * min(1, (12 - s) / 6) for s in range(12)]),
    ],
)
def test_learning_rate(overrides, expected):
    configuration = settings("train.learning_rate=0.01", *overrides)
    rates = [schedule.learning_rate(configuration, step) / 0.01 for step in range(12)]
    assert rates == pytest.approx(expected)


def test_both_networks_move_at_the_rate_of_the_step(make):
    """Adam's first step moves each weight by the learning rate, whatever its gradient."""
    for step, rate in ((0, 0.25), (3, 1.0), (7, 1.0), (8, 0.5)):
        trainer = make("train.warmup_steps=4", "train.decay_from=7")
        for optimizer in trainer.optimizers.values():
            optimizer.step = functools.partial(lambda move, _, rate: move(0, rate), optimizer.step)
        before = snapshot(trainer)
        trainer.step(step, batch(0))
        for network in ("generator", "discriminator"):
            moved = [
                (tensor - before[name]).abs().max() / trainer.config.train.learning_rate
                for name, tensor in trainer.state().items()
                if name.startswith(f"{network}.") and name.endswith("weight") and tensor.dim() == 4
            ]
            assert max(moved).item() == pytest.approx(rate, rel=1e-2)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), [20.0] * 12),
        (("train.decay_from=8",), [20.0] * 12),
        (("train.decay_from=8", "loss.tv_growth=3"), [*[20.0] * 9, 30.0, 40.0, 50.0]),
        (("train.decay_from=8", "loss.tv_growth=0"), [*[20.0] * 9, 15.0, 10.0, 5.0]),
        (("train.decay_from=8", "loss.tv_growth=3", "loss.tv_weight=0"), [0.0] * 12),
    ],
)
def test_weight_of_the_total_variation(overrides, expected):
    configuration = settings("loss.tv_weight=20", *overrides)
    assert [schedule.tv_weight(configuration, step) for step in range(12)] == pytest.approx(expected)


def test_a_step_takes_the_weight_that_it_has_then(make):
    def after(*overrides):
        trainer = make("train.decay_from=3", *overrides)
        return trainer.terms(batch(6)), run(trainer, [6])[0], trainer.state()

    terms, scalars, state = after("loss.tv_weight=0.1", "loss.tv_growth=4")  # half way down
    same_terms, same_scalars, same = after("loss.tv_weight=0.25")
    assert terms == same_terms
    assert torch.equal(scalars, same_scalars)
    assert not changed(same, state)
    assert changed(after("loss.tv_weight=0.1")[2], state)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("loss.tv_growth=4",), ["loss.tv_growth", "4", "needs train.decay_from", "at 1"]),
        (("train.decay_from=12",), ["train.decay_from", "12", "below train.steps"]),
        (("loss.critic_steps=5",), ["train.steps", "12", "loss.critic_steps 5", "15"]),
        (
            ("loss.critic_steps=4", "telemetry.log_every_steps=6"),
            ["telemetry.log_every_steps", "6", "critic_steps 4", "8"],
        ),
        (("loss.adversarial=wgan-gp", "model.norm=batch"), ["model.norm", "batch", "wgan-gp", "instance or group"]),
    ],
)
def test_settings_that_do_not_go_together(overrides, words):
    with pytest.raises(UserError) as caught:
        settings(*overrides)
    assert all(word in str(caught.value) for word in words)


def test_a_run_whose_rate_falls_keeps_its_end():
    assert "train.steps" not in settings().identity()
    assert settings("train.decay_from=5").identity()["train.steps"] == 12


# Which network learns


def test_the_generator_learns_in_the_last_of_the_critics_steps(make):
    trainer, updates = make("loss.adversarial=wgan-gp", "loss.critic_steps=3"), {"generator": [], "discriminator": []}

    def watch(name, move):
        return lambda before, rate: (updates[name].append(before), move(before, rate))

    for name, optimizer in trainer.optimizers.items():
        optimizer.step = watch(name, optimizer.step)
    for step in range(6):
        before = snapshot(trainer)
        scalars = dict(zip(SCALARS, run(trainer, [step])[0].tolist(), strict=True))
        moved = {name.split(".")[0] for name in changed(before, trainer.state()) if not name.startswith("optimizer")}
        learns = step in (2, 5)
        assert moved == {"discriminator"} | ({"generator", "average"} if learns else set())
        assert (scalars["generator/loss"] != 0) == learns
        assert (scalars["generator/gradient_norm"] > 0) == learns
        assert scalars["discriminator/gradient_norm"] > 0
    assert updates == {"generator": [0, 1], "discriminator": list(range(6))}
    run(trainer, [8])  # as after a resume: what counts is the step
    assert updates["generator"][-1] == 2


def test_requests_are_heard_in_every_step(make):
    trainer = make("loss.critic_steps=3")
    for step in range(3):
        assert trainer.step(step, batch(step), [0.0, 1.0, 0.0, 0.0])[len(SCALARS) :].tolist() == [0, 1, 0, 0]


# Clipping


def test_longer_gradients_are_scaled_and_shorter_ones_are_not(make):
    free, clipped, wide = make(), make("train.clip_norm=0.01"), make("train.clip_norm=1e6")
    scalars = {trainer: dict(zip(SCALARS, run(trainer, [0])[0].tolist(), strict=True)) for trainer in (free, clipped)}
    run(wide, [0])
    name = "discriminator/gradient_norm"
    assert scalars[clipped][name] == scalars[free][name] > 0.01  # what is shown is the gradient as it was
    for network in ("generator", "discriminator"):
        first, second, third = (getattr(t, f"{network}_gradients").gradients for t in (free, clipped, wide))
        assert second.norm().item() == pytest.approx(0.01, rel=1e-3)
        if network == "discriminator":  # the generator meets another discriminator after it
            assert torch.allclose(second / second.norm(), first / first.norm(), atol=1e-6)
        assert torch.equal(first, third)
