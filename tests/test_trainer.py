"""The training step: against a plain PyTorch one, and that microbatches, workers and resumes change nothing.

Reference: discriminator and generator steps written down with ordinary gradients, ``torch.nn.functional`` losses and
an Adam that is neither fused nor fed by a flat buffer. Whole runs are in other files.
Run: pytest tests/test_trainer.py
"""

import copy
import ctypes
import datetime
import gc
import itertools
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn
from waiting import PATIENCE_SECONDS

from autopainter import checkpoint, config, parallel, seeding
from autopainter.data.stream import Batch
from autopainter.pixels import network_input, to_pixels, to_unit
from autopainter.storage import open_store
from autopainter.trainer import SCALARS, Trainer

CPU = torch.device("cpu")
SIZE = 32
LEARNING_RATE = 2e-4


def build(feature_weights, *overrides, device=CPU):
    path, sha256 = feature_weights
    settings = [
        "run.name=test", "run.storage=unused", "data.manifest=unused", f"data.image_size={SIZE}",
        "model.generator_width=4", "model.discriminator_width=4", f"loss.vgg_weights={path}",
        f"loss.vgg_sha256={sha256}", "train.steps=9", "train.global_batch=4", "train.precision=float32",
        f"train.learning_rate={LEARNING_RATE}",
        "loss.tv_weight=0.1",  # what is painted first is nearly flat, where this term turns rounding errors into slopes
    ]  # fmt: skip
    return Trainer(config.load(None, [*settings, *overrides], environment={}), device)


@pytest.fixture
def make(feature_weights):
    """Makes trainers, with some fields of the configuration changed."""
    return lambda *overrides: build(feature_weights, *overrides)


def batch(step, rows=slice(None)):
    """Four samples of random pixels, coarse and fine."""
    generator = torch.Generator().manual_seed(step)
    coarse = F.interpolate(torch.rand(4, 8, 4, 4, generator=generator), SIZE, mode="bilinear")
    pixels = ((0.7 * coarse + 0.3 * torch.rand(4, 8, SIZE, SIZE, generator=generator)) * 255).to(torch.uint8)
    mask = (pixels[:, 7:] > 140).to(torch.uint8)
    hint = torch.cat([pixels[:, 4:7] * mask, mask], dim=1)
    keys = torch.randint(-(2**63), 2**63 - 1, (4,), generator=generator)
    names = [f"{step}-{row}" for row in range(4)]
    return Batch(step, names, pixels[:, :1], pixels[:, 1:4], hint, keys).part(rows)


def run(trainer, steps, rows=slice(None)):
    """Do some steps; their scalars."""
    return torch.stack([trainer.step(step, batch(step, rows))[: len(SCALARS)] for step in steps])


def snapshot(trainer):
    return {name: tensor.clone() for name, tensor in trainer.state().items()}


def changed(before, after):
    """Names of the tensors that are not equal bit for bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def without_influence(trainer):
    """Names of the biases in front of a norm that subtracts them again: their gradients are rounding errors."""
    found = set()
    for network in (trainer.generator, trainer.discriminator):
        names = {parameter: name for name, parameter in network.named_parameters()}
        leaves = [module for module in network.modules() if not list(module.children())]
        for module, follower in itertools.pairwise(leaves):
            if isinstance(follower, nn.InstanceNorm2d | nn.BatchNorm2d) and module.bias is not None:
                found.add(names[module.bias])
    return tuple(found)


def assert_same(state, expected, apart_from):
    """Equal up to the order of float additions: weights to 1 % of one step, moments to 1e-4 of a tensor's largest."""
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        tolerance = 1e-4 * float(tensor.abs().max()) if name.startswith("optimizer") else 0.01 * LEARNING_RATE
        if not name.endswith(apart_from):
            assert float((state[name] - tensor).abs().max()) <= tolerance, name


# One step against plain PyTorch


def grad_norm(network):
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])


def plain_steps(trainer, batches):
    """The same steps without anything of the trainer but its networks; returns state and scalars."""
    loss = trainer.config.loss
    generator, discriminator = copy.deepcopy(trainer.generator), copy.deepcopy(trainer.discriminator)
    average = copy.deepcopy(generator)
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, betas=(0.5, 0.999), foreach=False, fused=False)
        for network in (generator, discriminator)
    ]

    def against(logits, value):
        return {
            "gan": lambda: F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, value)),
            "lsgan": lambda: F.mse_loss(logits, torch.full_like(logits, value)),
            "hinge": lambda: F.relu(1 - logits if value else 1 + logits).mean(),
            "wgan-gp": lambda: -2 * logits.mean() if value else 2 * logits.mean(),
        }[loss.adversarial]()

    def penalty(condition, target, painted, keys):
        places, found = seeding.uniform(keys ^ (seeding.key(seeding.Use.PENALTY) >> 1), (1,)), []
        for row, place in enumerate(places):
            ends = [torch.cat([condition, images], dim=1)[row : row + 1].detach() for images in (target, painted)]
            between = (place * ends[0] + (1 - place) * ends[1]).requires_grad_()
            mean = discriminator(between[:, :5], between[:, 5:]).mean()
            slopes = torch.autograd.grad(mean, between, create_graph=True)[0]
            found.append((slopes.square().sum().sqrt() - 1) ** 2)
        return torch.stack(found).mean()

    rows = []
    for step, part in enumerate(batches):
        target, mask = part.color / 127.5 - 1, part.hint[:, 3:]
        condition = torch.cat([part.sketch / 127.5 - 1, (part.hint[:, :3] / 127.5 - 1) * mask, mask], dim=1)
        painted = generator(condition, part.dropout)

        discriminator.zero_grad()
        real, fake = discriminator(condition, target), discriminator(condition, painted.detach())
        judged = 0.5 * against(real, 1.0) + 0.5 * against(fake, 0.0)
        if loss.adversarial == "wgan-gp":
            judged = judged + 10 * penalty(condition, target, painted, part.dropout)
        judged.backward()
        norms = [grad_norm(discriminator)]
        optimizers[1].step()

        generator.zero_grad()
        logits = discriminator(condition, painted)
        varying = {"painted": painted, "error": painted - target}[loss.tv_of]
        steps = varying[..., 1:, :-1] - varying[..., :-1, :-1], varying[..., :-1, 1:] - varying[..., :-1, :-1]
        terms = [
            F.l1_loss(painted, target),
            F.mse_loss(trainer.features(painted), trainer.features(target)),
            -logits.mean() if loss.adversarial in ("hinge", "wgan-gp") else against(logits, 1.0),
            (steps[0].square() + steps[1].square() + 1e-8).sqrt().mean(),
        ]
        weighted = loss.pixel_weight * terms[0] + 0.01 * terms[1] + terms[2] + loss.tv_weight * terms[3]
        weighted.backward()
        norms.append(grad_norm(generator))
        optimizers[0].step()
        for mean, parameter in zip(average.parameters(), generator.parameters(), strict=True):
            mean.data += (1 - (1 + step) / (10 + step)) * (parameter.data - mean.data)
        accuracies = (real > 0).float().mean(), (fake < 0).float().mean()
        rows.append(torch.stack([judged, *accuracies, weighted, *terms, *norms]).detach())

    state = {}
    for name, network in (("generator", generator), ("average", average), ("discriminator", discriminator)):
        state |= {f"{name}.{entry}": parameter.detach() for entry, parameter in network.named_parameters()}
    for name, network, optimizer in zip(
        ("generator", "discriminator"), (generator, discriminator), optimizers, strict=True
    ):
        for entry, parameter in network.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"optimizer.{name}.{moment}.{entry}"] = optimizer.state[parameter][moment]
    return state, torch.stack(rows)


@pytest.mark.parametrize(
    ("adversarial", "channels_last", "tv_of"),
    [
        ("gan", True, "painted"), ("gan", False, "painted"), ("lsgan", True, "painted"), ("hinge", True, "painted"),
        ("wgan-gp", True, "painted"), ("wgan-gp", False, "painted"), ("gan", True, "error"),
    ],
)  # fmt: skip
def test_steps_are_those_of_plain_pytorch(make, adversarial, channels_last, tv_of):
    trainer = make(f"loss.adversarial={adversarial}", f"train.channels_last={channels_last}", f"loss.tv_of={tv_of}")
    expected, expected_scalars = plain_steps(trainer, [batch(step) for step in range(3)])
    scalars = run(trainer, range(3))
    assert scalars.shape == (3, len(SCALARS))
    assert torch.allclose(scalars, expected_scalars, rtol=1e-4, atol=1e-6)
    assert_same(trainer.state(), expected, without_influence(trainer))


@pytest.mark.parametrize("term", ["pixel", "feature", "adversarial", "tv"])
def test_every_term_alone_trains_the_generator(make, term):
    """The notebook's TV term was that of the target: a constant."""
    weights = {name: 1.0 if name == term else 0.0 for name in ("pixel", "feature", "adversarial", "tv")}
    trainer = make(*(f"loss.{name}_weight={weight}" for name, weight in weights.items()))
    before = snapshot(trainer)
    scalars = dict(zip(SCALARS, run(trainer, [0])[0].tolist(), strict=True))
    assert scalars["generator/loss"] == pytest.approx(scalars[f"generator/{term}"])
    weights = {name for name in before if name.startswith("generator.") and name.endswith("conv.weight")}
    assert weights <= changed(before, trainer.state())


def test_without_a_feature_term_there_is_no_feature_network(make):
    trainer = make("loss.feature_weight=0", "loss.vgg_weights=null")
    scalars = dict(zip(SCALARS, run(trainer, [0])[0].tolist(), strict=True))
    assert trainer.features is None
    assert scalars["generator/feature"] == 0
    assert all(parameter.grad.any() for parameter in trainer.generator.parameters() if parameter.dim() == 4)


def test_each_network_is_moved_by_its_own_step_alone(make):
    trainer, states, gradients = make(), [], []

    def watched(step):
        def call(*arguments):
            gradients.append(trainer.discriminator_gradients.gradients.clone())
            states.append(snapshot(trainer))
            step(*arguments)
            states.append(snapshot(trainer))

        return call

    for optimizer in trainer.optimizers.values():
        optimizer.step = watched(optimizer.step)
    features = {name: tensor.clone() for name, tensor in trainer.features.state_dict().items()}
    start = snapshot(trainer)
    run(trainer, [0])

    before_d, after_d, before_g, after_g = states
    assert not changed(start, before_d)
    moved = {name.split(".")[0] for name in changed(before_d, after_d) if not name.startswith("optimizer")}
    assert moved == {"discriminator"}
    assert not changed(after_d, before_g)
    moved = {name.split(".")[0] for name in changed(before_g, after_g) if not name.startswith("optimizer")}
    assert moved == {"generator"}
    assert torch.equal(*gradients)  # the generator's backward pass leaves none in the discriminator
    assert all(torch.equal(features[name], tensor) for name, tensor in trainer.features.state_dict().items())


@pytest.mark.parametrize(
    ("decay", "step", "expected"),
    [(0.999, 0, 0.1), (0.999, 1, 2 / 11), (0.999, 90, 91 / 100), (0.999, 10**6, 0.999), (0.5, 90, 0.5), (0, 90, 0)],
)
def test_the_average_follows_the_generator(make, decay, step, expected):
    trainer = make(f"train.ema_decay={decay}")
    run(trainer, [0])
    before = snapshot(trainer)
    trainer.step(step, batch(1))
    after = trainer.state()
    for name in (name for name in before if name.startswith("generator.")):
        average = name.replace("generator.", "average.")
        blend = expected * before[average].double() + (1 - expected) * after[name].double()
        assert torch.allclose(after[average].double(), blend, rtol=0, atol=1e-7), name
        assert after[average].data_ptr() != after[name].data_ptr()


def test_the_average_has_the_statistics_of_the_generator(make):
    """Those of batch norm are moving averages themselves."""
    trainer = make("model.norm=batch")
    run(trainer, range(2))
    buffers = dict(trainer.generator.named_buffers())
    assert any(buffer.any() for buffer in buffers.values())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in trainer.average.named_buffers())


# Gradients in one buffer


@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients_are_views_of_one_buffer_in_the_order_of_their_weights(make, channels_last):
    trainer = make(f"train.channels_last={channels_last}")
    for network, buffer in (
        (trainer.generator, trainer.generator_gradients),
        (trainer.discriminator, trainer.discriminator_gradients),
    ):
        run(trainer, [0])
        flat, offset = buffer.gradients, 0
        assert set(buffer.parameters) == set(network.parameters())
        for parameter in buffer.parameters:
            assert parameter.grad.data_ptr() == flat[offset:].data_ptr()
            assert parameter.grad.stride() == parameter.stride()
            if parameter.dim() == 4 and min(parameter.shape[:2]) > 1:
                assert parameter.is_contiguous(memory_format=torch.channels_last) == channels_last
            offset += parameter.numel()
        assert offset == len(flat)
        assert flat.double().square().sum().item() == pytest.approx(
            sum(parameter.grad.double().square().sum().item() for parameter in network.parameters())
        )
        assert buffer.scalars.data_ptr() < flat.data_ptr() < buffer.scalars.data_ptr() + 1024
        buffer.zero()
        assert not any(parameter.grad.any() for parameter in network.parameters())


# Microbatches, recomputation, precision


@pytest.mark.parametrize(("microbatch", "adversarial"), [(1, "gan"), (2, "gan"), (3, "gan"), (3, "wgan-gp")])
def test_microbatches_change_nothing_but_float_order(make, microbatch, adversarial):
    whole = make(f"loss.adversarial={adversarial}")
    parts = make(f"loss.adversarial={adversarial}", f"train.microbatch={microbatch}")
    assert torch.allclose(run(parts, range(3)), run(whole, range(3)), rtol=1e-5)
    assert_same(parts.state(), whole.state(), without_influence(whole))


def test_no_weight_is_left_to_rounding_errors(make):
    """Adam turns a gradient that is nothing but rounding errors into whole steps, others at each microbatch size."""
    whole, parts = make(), make("train.microbatch=1")
    run(whole, [0])
    run(parts, [0])
    assert_same(parts.state(), whole.state(), ())


@pytest.mark.parametrize("blocks", ["outer", "all"])
@pytest.mark.parametrize("microbatch", ["null", "2"])
def test_recomputation_changes_no_bit(make, blocks, microbatch):
    kept = make(f"train.microbatch={microbatch}")
    recomputed = make(f"train.microbatch={microbatch}", f"train.activation_checkpointing={blocks}")
    assert torch.equal(run(recomputed, range(2)), run(kept, range(2)))
    assert not changed(recomputed.state(), kept.state())


@pytest.mark.parametrize("microbatch", ["null", "2"])
def test_bfloat16_is_for_the_networks_alone(make, microbatch):
    exact, rough = make(), make("train.precision=bfloat16", f"train.microbatch={microbatch}")
    expected, scalars = run(exact, [0])[0], run(rough, [0])[0]
    for name, value, right in zip(SCALARS, scalars.tolist(), expected.tolist(), strict=True):
        # Where a product is rounded depends on the processor; a norm adds up what all layers make of that.
        assert value == pytest.approx(right, rel=0.05 if name.endswith("norm") else 0.03, abs=0.03), name
    assert scalars.dtype == torch.float32
    assert {tensor.dtype for tensor in rough.state().values()} == {torch.float32}
    assert not torch.equal(scalars, expected)
    gradients = rough.generator_gradients.gradients, exact.generator_gradients.gradients
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


def test_compiled_networks_do_the_same(make):
    eager, compiled = make(), make("train.compile=true")
    assert torch.allclose(run(compiled, range(2)), run(eager, range(2)), rtol=1e-4, atol=1e-6)
    assert_same(compiled.state(), eager.state(), without_influence(eager))


STEP = """
import sys
from test_trainer import build, run
run(build(sys.argv[1:], "model.dropout=0.5"), range(2))
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""


def test_a_step_imports_nothing_of_torch_compile(feature_weights):
    """It would take seconds of every start of every worker."""
    search = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", STEP, *feature_weights]
    done = subprocess.run(command, env=os.environ | search, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.stdout == "[]\n", done.stderr


# Determinism and resume


def test_two_runs_are_equal_bit_for_bit(make):
    torch.manual_seed(1)
    first = make()
    scalars = run(first, range(3))
    torch.manual_seed(2)  # nothing comes from the global generator
    second = make()
    assert torch.equal(run(second, range(3)), scalars)
    assert not changed(first.state(), second.state())
    assert changed(first.state(), make("train.seed=1").state())


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.channels_last=false",),
        ("train.microbatch=1",),
        ("train.precision=bfloat16", "train.activation_checkpointing=all"),
        ("model.norm=batch",),
        ("model.norm=group", "loss.adversarial=hinge"),
        ("model.upsampling=resize", "train.warmup_steps=3", "train.decay_from=3", "train.clip_norm=0.1"),
        ("loss.adversarial=wgan-gp", "loss.critic_steps=3", "telemetry.log_every_steps=3"),
    ],
    ids=" ".join,
)
def test_a_resumed_run_is_equal_bit_for_bit(make, tmp_path, overrides):
    trainer, store = make(*overrides), open_store(str(tmp_path))
    run(trainer, range(2))
    writer = checkpoint.CheckpointWriter(store, 1, checkpoint.Retention(1), meta={})
    writer.save(2, trainer.state())
    scalars = run(trainer, range(2, 4))
    writer.wait()

    _, tensors = checkpoint.newest(store)
    for resumed in (make(*overrides), trainer):  # a fresh process, and one that goes back
        resumed.load_state(tensors)
        assert not changed(tensors, resumed.state())
        assert torch.equal(run(resumed, range(2, 4)), scalars)
    fresh = make(*overrides)
    fresh.load_state(tensors)
    run(fresh, range(2, 4))
    assert not changed(fresh.state(), trainer.state())


class MallocInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33, which counts what is in use")
def test_steps_leave_no_memory_behind(make):
    count = ctypes.CDLL(None).mallinfo2
    count.restype = MallocInfo
    trainer, steps = make(), 40

    def in_use_after(first):
        run(trainer, range(first, first + steps))
        gc.collect()
        information = count()
        return information.uordblks + information.hblkhd

    before = in_use_after(0)
    assert in_use_after(steps) - before < 1024 * steps  # bytes; the nodes of one step's graph take 10 times that


def test_the_state_is_the_same_set_of_tensors_before_and_after_a_step(make):
    trainer = make("model.norm=batch")
    before = snapshot(trainer)
    run(trainer, [0])
    after = trainer.state()
    assert before.keys() == after.keys()
    assert not any(tensor.any() for name, tensor in before.items() if name.startswith("optimizer."))
    assert all(tensor.any() for name, tensor in after.items() if name.startswith("optimizer.generator.exp_avg."))
    assert trainer.state()["generator.up.0.conv.bias"].data_ptr() == after["generator.up.0.conv.bias"].data_ptr()


@pytest.mark.parametrize(
    "name", ["generator.up.0.conv.weight", "average.down.1.norm.bias", "optimizer.discriminator.exp_avg.layers.0.bias"]
)
def test_a_state_with_a_tensor_missing_is_refused(make, name):
    trainer = make()
    tensors = snapshot(trainer)
    del tensors[name]
    with pytest.raises(KeyError, match=name):
        trainer.load_state(tensors)


# Several workers


def work(rank, folder, feature_weights):
    """One of two processes, each with the rows of the batch that the stream gives to it."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    trainer = build(feature_weights, "train.microbatch=1", f"train.seed={rank}")
    parallel.broadcast(trainer.state().values())  # as on resume: the second worker was made with other weights
    scalars = run(trainer, range(3), rows=slice(rank, None, parallel.world()))
    assert parallel.rank() == rank
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in snapshot(trainer).items()} | {"scalars": scalars},
        f"{folder}/{rank}.safetensors",
    )
    dist.destroy_process_group()


def test_two_workers_do_what_one_does(make, feature_weights, tmp_path):
    torch.multiprocessing.start_processes(work, (str(tmp_path), feature_weights), nprocs=2, start_method="spawn")
    first, second = (safetensors.torch.load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert not changed(first, second)

    assert (parallel.rank(), parallel.world()) == (0, 1)
    alone = make()
    scalars = run(alone, range(3))
    assert torch.allclose(first.pop("scalars"), scalars, rtol=1e-5)
    assert_same(first, alone.state(), without_influence(alone))


# Images in and out


def test_pixels_survive_the_way_to_units_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    units = to_unit(pixels)
    assert (units.min(), units.max()) == (-1, 1)
    assert units.dtype == torch.float32
    assert torch.equal(to_pixels(units), pixels)
    assert to_pixels(torch.tensor([-2.0, -1, -0.999, 0.997, 2])).tolist() == [0, 0, 0, 255, 255]


def test_the_input_tells_hints_from_their_absence():
    hint = torch.zeros(1, 4, 2, 2, dtype=torch.uint8)
    hint[0, :, 0, 0] = torch.tensor([255, 0, 51, 1])
    hint[0, :3, 1, 1] = 200  # outside the mask: nothing
    sketch = torch.tensor([[[[0, 255], [51, 255]]]], dtype=torch.uint8)
    found = network_input(sketch, hint)
    assert found.shape == (1, 5, 2, 2)
    assert found[0, 0].flatten().tolist() == pytest.approx([-1, 1, -0.6, 1])
    assert found[0, 1:, 0, 0].tolist() == pytest.approx([1, -1, -0.6, 1])
    assert not found[0, 1:].flatten(1)[:, 1:].any()


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_painting_is_done_by_the_average_without_dropout(make, norm):
    trainer, part = make(f"model.norm={norm}"), batch(0)
    run(trainer, range(2))
    nn.init.normal_(trainer.average.up[0].conv.weight, generator=torch.Generator().manual_seed(0))
    before = snapshot(trainer)
    painted = trainer.paint(part.sketch, part.hint)
    assert painted.shape == (4, 3, SIZE, SIZE)
    assert painted.dtype == torch.uint8
    assert float(painted.float().std()) > 10
    with torch.no_grad():
        expected = to_pixels(copy.deepcopy(trainer.average).eval()(network_input(part.sketch, part.hint)))
    assert (painted.int() - expected.int()).abs().max() <= 1
    alone = torch.cat([trainer.paint(part.sketch[row : row + 1], part.hint[row : row + 1]) for row in range(4)])
    assert (painted.int() - alone.int()).abs().max() <= 1  # whatever else is in the batch
    assert not changed(before, trainer.state())
