"""The training step on a real GPU: what a CPU computes, bit for bit again, compiled, and in less memory.

Not run where there is none. Run: pytest tests/test_gpu.py
"""

import pytest
import torch
from test_trainer import assert_same, build, changed, run, without_influence

from autopainter import seeding

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture
def make(feature_weights, monkeypatch):
    """Makes trainers on the GPU, with some fields of the configuration changed."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return lambda *overrides: build(feature_weights, *overrides, device=torch.device("cuda"))


@pytest.mark.parametrize("norm", ["instance", "group"])
@pytest.mark.parametrize("adversarial", ["gan", "wgan-gp"])
def test_steps_are_those_of_a_cpu(make, feature_weights, norm, adversarial):
    settings = f"model.norm={norm}", f"loss.adversarial={adversarial}"
    here, there = make(*settings), build(feature_weights, *settings)
    assert torch.allclose(run(here, range(3)).cpu(), run(there, range(3)), rtol=1e-3, atol=1e-5)
    state = {name: tensor.cpu() for name, tensor in here.state().items()}
    assert_same(state, there.state(), without_influence(there))


@pytest.mark.parametrize("settings", [(), ("train.compile=true",), ("train.activation_checkpointing=all",)])
def test_steps_in_bfloat16_are_the_same_bits_again(make, settings):
    first, second = (make("train.precision=bfloat16", *settings) for _ in range(2))
    assert torch.equal(run(first, range(3)), run(second, range(3)))
    assert not changed(first.state(), second.state())


def test_a_resumed_run_has_the_same_bits(make):
    whole, first, second = (make("train.precision=bfloat16") for _ in range(3))
    run(whole, range(4))
    run(first, range(2))
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()}, 2)
    run(second, range(2, 4))
    assert not changed(whole.state(), second.state())


def test_compiled_networks_do_the_same(make):
    eager, compiled = make(), make("train.compile=true")
    assert torch.allclose(run(compiled, range(2)), run(eager, range(2)), rtol=1e-3, atol=1e-5)


def test_dropout_is_that_of_a_cpu():
    keys = torch.arange(5) * 12345
    assert torch.equal(seeding.uniform(keys.cuda(), (3, 7)).cpu(), seeding.uniform(keys, (3, 7)))
