"""U-Net and PatchGAN: shapes, dropout by keys, recomputation, receptive field, initial weights.

References: pix2pix's published layers (arXiv 1611.07004, appendix 6.1) and the parameter counts of its authors' PyTorch
code (54,413,955 and 2,768,705); the faults of earlier implementations that notes 2.2 and 2.3 list.
Run: pytest tests/test_models.py
"""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autopainter.models.layers import KeyedDropout, initialise, norm_layer
from autopainter.models.patchgan import PatchGAN
from autopainter.models.unet import UNet, levels_for
from autopainter.models.vgg import VGGFeatures

KEYS = torch.tensor([3, -5, 2**62, 11])


def unet(size=32, width=4, norm="instance", dropout=0.5, upsampling="transposed", recompute="none", seed=0):
    network = UNet(levels_for(size), width, norm, dropout, upsampling, recompute)
    initialise(network, seed, 0)
    return network


def patchgan(width=4, norm="instance", seed=0):
    network = PatchGAN(width, norm)
    initialise(network, seed, 1)
    return network


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def convolution_weights(network):
    return {name: parameter for name, parameter in network.named_parameters() if parameter.dim() == 4}


# The generator


@pytest.mark.parametrize(
    ("size", "levels"), [(32, 5), (64, 6), (96, 5), (128, 7), (256, 8), (352, 5), (512, 8), (1024, 8)]
)
def test_levels(size, levels):
    assert levels_for(size) == levels


@pytest.mark.parametrize("size", [32, 64, 96, 512])
def test_unet_paints_images_of_the_size_of_its_input(size):
    network = unet(size)
    nn.init.normal_(network.up[0].conv.weight, std=10)
    batch = 1 if size == 512 else 2
    painted = network(noise(batch, 5, size, size), KEYS[:batch])
    assert painted.shape == (batch, 3, size, size)
    assert painted.dtype == torch.float32
    assert painted.abs().max() <= 1
    assert painted.min() < -0.9  # the whole range of the tanh is in reach
    assert painted.max() > 0.9


@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_resize_convolutions_leave_no_checkerboard(norm):
    """A flat map through one decoder block: transposed convolutions give each place another number of inputs."""
    spread = {}
    for upsampling in ("transposed", "resize"):
        block = unet(norm=norm, upsampling=upsampling).up[1].eval()
        inputs = 2 * 8  # the map of the level below and its skip
        out = block.conv(torch.ones(1, inputs, 8, 8)).detach()[..., 2:-2, 2:-2]
        spread[upsampling] = float(out.std(dim=(2, 3)).max() / out.abs().mean())
    assert spread["resize"] < 1e-5 < 0.1 < spread["transposed"]


@pytest.mark.parametrize("size", [32, 96])
def test_unet_with_resize_convolutions_paints(size):
    network = unet(size, upsampling="resize")
    painted = network(noise(2, 5, size, size), KEYS[:2])
    assert painted.shape == (2, 3, size, size)
    painted.sum().backward()
    assert all(parameter.grad.any() for parameter in network.parameters() if parameter.dim() == 4)


def test_unet_widths_are_those_of_pix2pix():
    network = unet(512)
    assert [block.conv.out_channels for block in network.down] == [4, 8, 16, 32, 32, 32, 32, 32]
    assert [block.conv.out_channels for block in network.up] == [3, 4, 8, 16, 32, 32, 32, 32]
    assert [block.conv.in_channels for block in network.up] == [8, 16, 32, 64, 64, 64, 64, 32]
    for block in itertools.chain(network.down, network.up):
        assert (block.conv.kernel_size, block.conv.stride, block.conv.padding) == ((4, 4), (2, 2), (1, 1))


@pytest.mark.parametrize("size", [32, 96])
def test_unet_uses_every_input_and_every_block(size):
    """The earlier notebook dropped a decoder block without a word (its blocks were zipped with fewer skips)."""
    network = unet(size)
    image = noise(16, 5, size, size).requires_grad_()
    (network(image) * noise(16, 3, size, size, seed=1)).sum().backward()
    assert (image.grad.abs().amax(dim=(0, 2, 3)) > 0).all()
    for name, weight in convolution_weights(network).items():
        inputs = weight.grad.abs().sum(dim=(1, 2, 3) if name.startswith("up") else (0, 2, 3))
        assert (inputs > 0).float().mean() > 0.9  # the skip is half of them; single rectifiers may be shut


@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
def test_only_batch_norm_couples_samples(norm):
    generator, discriminator = unet(norm=norm), patchgan(norm=norm)
    images, condition = noise(4, 3, 32, 32), noise(4, 5, 32, 32, seed=1)
    with torch.no_grad():
        for network, inputs in ((generator, (condition, KEYS)), (discriminator, (condition, images))):
            together = network(*inputs)
            alone = torch.cat([network(*(tensor[row : row + 1] for tensor in inputs)) for row in range(4)])
            same = torch.allclose(alone, together, rtol=1e-4, atol=1e-4 * float(together.abs().max()))
            assert same == (norm != "batch")


@pytest.mark.parametrize("width", [4, 7, 20, 25, 64, 100])
@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
def test_networks_can_be_built_at_every_width_that_the_configuration_takes(norm, width):
    with torch.device("meta"):
        assert UNet(8, width, norm, 0.5).up[1].conv.out_channels == width
        assert PatchGAN(width, norm).layers[0].out_channels == width


def test_parameter_counts_are_those_of_pix2pix():
    """Ours have 2 more input channels. Biases of convolutions are left out: theirs are 3 in G and 65 in D."""
    with torch.device("meta"):
        generator, discriminator = UNet(8, 64, "batch", 0.5), PatchGAN(64, "batch")

    def count(network):
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
        biases = sum(module.bias.numel() for module in convolutions if module.bias is not None)
        return sum(parameter.numel() for parameter in network.parameters()) - biases

    more_inputs = 2 * 16 * 64
    assert count(generator) == 54_413_955 - 3 + more_inputs
    assert count(discriminator) == 2_768_705 - 65 + more_inputs


# Dropout


def giga_multiplications(network, *channels):
    """Multiplications of one forward pass of a 512x512 image, in 1e9; nothing is computed."""
    with torch.device("meta"):
        images = [torch.empty(1, count, 512, 512) for count in channels]
    with FlopCounterMode(display=False) as counter:
        network.to("meta")(*images)
    return counter.get_total_flops() / 2e9


def test_multiplications_of_an_image():
    """Pix2pix's networks take 24.2 and 13.1; each two more channels of input 2 * 64 * 16 * 256 ** 2 = 0.134 more."""
    assert giga_multiplications(UNet(8, 64, "instance", 0.5), 5) == pytest.approx(24.2 + 0.134, abs=0.05)
    assert giga_multiplications(PatchGAN(64, "instance"), 5, 3) == pytest.approx(13.1 + 0.134, abs=0.06)
    assert giga_multiplications(VGGFeatures("relu2_2"), 3) == pytest.approx(24.6, abs=0.05)
    assert giga_multiplications(VGGFeatures("relu4_3"), 3) == pytest.approx(72.9, abs=0.05)


def test_dropout_masks_do_not_depend_on_the_batch():
    dropout, ones = KeyedDropout(0.5, 3), torch.ones(4, 8, 6, 6)
    together = dropout(ones, KEYS)
    for row in range(4):
        assert torch.equal(dropout(ones[:1], KEYS[row : row + 1])[0], together[row])
    assert torch.equal(dropout(ones, KEYS.flip(0)), together.flip(0))


def test_dropout_needs_keys():
    x = noise(4, 8, 6, 6)
    assert torch.equal(KeyedDropout(0.5, 3)(x, None), x)
    assert torch.equal(KeyedDropout(0.0, 3)(x, KEYS), x)


def test_dropout_masks_differ_between_samples_and_layers():
    ones = torch.ones(4, 8, 16, 16)
    masks = torch.cat([KeyedDropout(0.5, layer)(ones, KEYS) for layer in (1, 2)]).flatten(1) > 0
    for a, b in itertools.combinations(masks, 2):
        assert abs((a == b).float().mean() - 0.5) < 5 * 0.5 / 2048**0.5


@pytest.mark.parametrize("probability", [0.2, 0.5, 0.8])
def test_dropout_keeps_the_expected_value(probability):
    kept = KeyedDropout(probability, 1)(torch.ones(16, 8, 32, 32), torch.arange(16))
    assert torch.equal(kept.unique(), torch.tensor([0, 1 / (1 - probability)]))
    deviation = (probability / (1 - probability)) ** 0.5
    assert abs(kept.double().mean() - 1) < 5 * deviation / kept.numel() ** 0.5


def test_dropout_is_in_the_three_innermost_decoder_blocks():
    network = unet(512)
    assert [block.dropout is not None for block in network.up] == [False] * 5 + [True] * 3
    assert len({block.dropout.salt for block in network.up if block.dropout}) == 3


def test_unet_draws_by_the_keys_alone():
    network, image = unet(), noise(1, 5, 32, 32).expand(3, -1, -1, -1)
    with torch.no_grad():
        painted = network(image, torch.tensor([7, 8, 7]))
        torch.manual_seed(1)
        assert torch.equal(network(image, torch.tensor([7, 8, 7])), painted)
        network.eval()  # the mode is none of its business, the keys are
        assert torch.equal(network(image, torch.tensor([7, 8, 7])), painted)
        plain = network(image)
    assert torch.equal(painted[0], painted[2])
    assert not torch.allclose(painted[0], painted[1], rtol=1e-2)
    assert torch.equal(plain[0], plain[1])
    assert not torch.allclose(plain[0], painted[0], rtol=1e-2)


# Activation checkpointing


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recomputation_changes_no_bit(precision, channels_last):
    results = {}
    for recompute in ("none", "outer", "all"):
        network = unet(recompute=recompute)
        image = noise(2, 5, 32, 32).requires_grad_()
        if channels_last:
            network.to(memory_format=torch.channels_last)
            image.data = image.data.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            painted = network(image, KEYS[:2])
        painted.backward(noise(2, 3, 32, 32, seed=1))
        results[recompute] = [painted, image.grad, *(parameter.grad for parameter in network.parameters())]
    assert all(bool(tensor.any()) for tensor in results["none"][:2])
    for recompute in ("outer", "all"):
        assert all(torch.equal(a, b) for a, b in zip(results[recompute], results["none"], strict=True))


@pytest.mark.parametrize(("recompute", "blocks"), [("none", set()), ("outer", {0, 1}), ("all", set(range(5)))])
def test_recomputation_runs_the_named_blocks_again(recompute, blocks):
    network, calls = unet(recompute=recompute), []
    for level, block in itertools.chain(enumerate(network.down), enumerate(network.up)):
        block.register_forward_pre_hook(lambda *_, level=level: calls.append(level))
    painted = network(noise(2, 5, 32, 32), KEYS[:2])
    assert sorted(calls) == sorted([*range(5)] * 2)
    calls.clear()
    painted.sum().backward()
    assert sorted(calls) == sorted([*blocks] * 2)


# The discriminator


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (256, 256)])
def test_patchgan_judges_patches(height, width):
    logits = patchgan()(noise(2, 5, height, width), noise(2, 3, height, width, seed=1))
    assert logits.shape == (2, 1, height // 8 - 2, width // 8 - 2)


def test_patchgan_receptive_field_is_70():
    """Batch norm with its initial statistics is close to the identity; positive weights let nothing cancel out."""
    network = patchgan(norm="batch").double().eval()
    for weight in convolution_weights(network).values():
        weight.data.fill_(1.0)
    condition = torch.ones(1, 5, 128, 128, dtype=torch.float64, requires_grad=True)
    image = torch.ones(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = network(condition, image)
    for row, column in [(6, 6), (6, 7), (7, 6)]:
        for gradient in torch.autograd.grad(logits[0, 0, row, column], (condition, image), retain_graph=True):
            seen = gradient[0].abs() > 0
            assert torch.equal(seen.all(dim=0), seen.any(dim=0))
            rows, columns = seen[0].any(dim=1).nonzero().flatten(), seen[0].any(dim=0).nonzero().flatten()
            assert seen[0].sum() == 70 * 70
            assert (len(rows), len(columns)) == (70, 70)
            # The centre of the field is the centre of the patch: stride 8, in the middle of the image.
            assert rows.double().mean() == 63.5 + 8 * (row - 6.5)
            assert columns.double().mean() == 63.5 + 8 * (column - 6.5)


def test_patchgan_gives_logits():
    """Logits are linear in the last convolution: no sigmoid, rectifier or norm behind it, as the notebook had."""
    network, condition, image = patchgan(), noise(2, 5, 64, 64), noise(2, 3, 64, 64, seed=1)
    with torch.no_grad():
        logits = network(condition, image)
        convolution_weights(network)["layers.11.weight"].mul_(-1000)
        scaled = network(condition, image)
    assert logits.std() > 0
    assert torch.allclose(scaled, -1000 * logits, rtol=1e-3, atol=1e-3 * float(scaled.abs().max()))
    assert scaled.min() < -1
    assert scaled.max() > 1


# Initial weights


@pytest.mark.parametrize("build", [unet, patchgan])
def test_initial_weights_are_a_function_of_the_seed(build):
    torch.manual_seed(1)
    first = build(seed=5).state_dict()
    torch.manual_seed(2)
    again, other = build(seed=5).state_dict(), build(seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    weights = [name for name, tensor in first.items() if tensor.dim() == 4]
    assert not any(torch.equal(first[name], other[name]) for name in weights)


def test_initial_weights_of_two_networks_differ():
    first, second = PatchGAN(4, "instance"), PatchGAN(4, "instance")
    initialise(first, 0, 0)
    initialise(second, 0, 1)
    pairs = zip(convolution_weights(first).values(), convolution_weights(second).values(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
def test_initial_weights_have_the_distribution_of_pix2pix(norm):
    network = unet(width=16, norm=norm)
    weights = torch.cat([weight.flatten() for weight in convolution_weights(network).values()]).double()
    assert abs(weights.mean()) < 5 * 0.02 / len(weights) ** 0.5
    assert abs(weights.std() / 0.02 - 1) < 5 / (2 * len(weights)) ** 0.5
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all()


def test_instance_norm_is_the_batch_norm_of_one_sample():
    """Why instance norm is the default: the authors train with batch norm at batch size 1."""
    image = noise(1, 6, 8, 8) * 3 + 1
    assert torch.allclose(norm_layer("instance", 6)(image), norm_layer("batch", 6)(image), atol=1e-6)


@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    ("order", "arriving"), list(itertools.product([torch.contiguous_format, torch.channels_last], repeat=2))
)
def test_no_memory_order_changes_the_gradient_of_a_norm(norm, samples, order, arriving):
    """torch 2.13's own InstanceNorm2d is wrong by more than 100 % for one sample and a channels-last gradient."""
    image, slope = noise(samples, 8, 4, 4), noise(samples, 8, 4, 4, seed=1)

    def gradients(dtype, order, arriving):
        layer = norm_layer(norm, 8).to(dtype)
        given = image.to(dtype).contiguous(memory_format=order).requires_grad_()
        out = layer(given)
        out.backward(slope.to(dtype).contiguous(memory_format=arriving))
        return out, given.grad, layer.weight.grad, layer.bias.grad

    expected = gradients(torch.float64, torch.contiguous_format, torch.contiguous_format)
    found = gradients(torch.float32, order, arriving)
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-4, atol=1e-5)
    assert found[0].is_contiguous(memory_format=order)
