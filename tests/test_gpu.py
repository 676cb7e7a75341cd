"""The training step on a real GPU: what a CPU computes, bit for bit again, compiled, and in less memory.

Not run where there is none. Run: pytest tests/test_gpu.py
"""

import itertools

import pytest
import torch
from test_trainer import assert_same, batch, build, changed, run, without_influence

from autopainter import memory, seeding
from autopainter.data import manifest, stream
from autopainter.data.stream import Batch, TrainingStream
from autopainter.data.upload import Upload

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
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    run(second, range(2, 4))
    assert not changed(whole.state(), second.state())


def test_compiled_networks_do_the_same(make):
    eager, compiled = make(), make("train.compile=true")
    assert torch.allclose(run(compiled, range(2)), run(eager, range(2)), rtol=1e-3, atol=1e-5)


def test_dropout_is_that_of_a_cpu():
    keys = torch.arange(5) * 12345
    assert torch.equal(seeding.uniform(keys.cuda(), (3, 7)).cpu(), seeding.uniform(keys, (3, 7)))


def test_pinned_batches_are_the_same(dataset, small):
    """More of them than are made ahead, so that the same memory holds several, one after the other."""
    streams = [TrainingStream(manifest.load(dataset), small, 0, 1, 0, pinned=pinned) for pinned in (True, False)]
    try:
        for pinned, plain in itertools.islice(zip(*streams, strict=True), 20):
            assert all(tensor.is_pinned() for tensor in pinned.tensors())
            assert not any(tensor.is_pinned() for tensor in plain.tensors())
            assert pinned.keys == plain.keys
            for one, other in zip(pinned.tensors(), plain.tensors(), strict=True):
                assert torch.equal(one, other)
    finally:
        for running in streams:
            running.close()


def test_no_memory_is_lent_again_while_it_is_copied_or_used():
    """The host makes the next batches long before the GPU comes to use the first one."""
    upload, busy, sums = Upload(torch.device("cuda")), torch.rand(4096, 4096, device="cuda"), []
    for number in range(40):
        tensors = stream._allocate(256, 16, pinned=True)
        for tensor in tensors.values():
            tensor.fill_(number)
        moved = upload(Batch(number, [], **tensors))
        del tensors, tensor
        for _ in range(10):
            busy = (busy @ busy).clamp(0, 1)
        sums.append(torch.stack([tensor.long().sum() for tensor in moved.tensors()]))
        del moved
    each = torch.tensor([16 * planes * 256**2 for planes in (1, 3, 4)] + [16])
    assert torch.equal(torch.stack(sums).cpu(), torch.arange(40)[:, None] * each)


def test_a_batch_is_copied_while_the_step_before_is_computed():
    upload, busy = Upload(torch.device("cuda")), torch.rand(8192, 8192, device="cuda")
    pinned = Batch(0, [], **stream._allocate(256, 16, pinned=True))
    upload(pinned)  # the first time makes the memory
    torch.cuda.synchronize()
    for _ in range(100):
        busy = (busy @ busy).clamp(0, 1)
    computed = torch.cuda.Event()
    computed.record()
    upload(pinned)
    upload._copies.synchronize()
    assert not computed.query()


def test_pinned_batches_train_to_the_same_bits(make):
    plain, pinned = make(), make()
    run(plain, range(4))
    for step in range(4):
        whole = batch(step)
        pinned.step(step, Batch(step, whole.keys, *(tensor.pin_memory() for tensor in whole.tensors())))
    assert not changed(plain.state(), pinned.state())


def test_too_little_memory_to_pin_is_the_hosts():
    with pytest.raises(MemoryError) as caught:
        stream._allocate(1 << 20, 1 << 10, pinned=True)
    assert memory.ran_out(caught.value) == "host"
