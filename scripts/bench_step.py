"""How fast is a training step, beside a plain one, and what does each setting gain?

Each variant has a process of its own; they take turns, in another order each round, so that what else the machine does
falls on all alike. A turn is some steps on pictures of random pixels; no data is read. Peak memory is that of a turn:
on a GPU what torch's allocator held, on cores the process's largest resident size less what it had before the networks.

    .venv/bin/python scripts/bench_step.py --size 128 --microbatch 4
    .venv/bin/python scripts/bench_step.py --device cuda --size 512 --microbatch 32
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import safetensors.torch
import torch
from measuring import bench_config, cpu
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autopainter import losses
from autopainter.adam import Adam
from autopainter.cgroup import Groups
from autopainter.config import Config, FeatureLayer
from autopainter.data.stream import Batch
from autopainter.models import vgg
from autopainter.models.layers import KeyedDropout, initialise
from autopainter.models.patchgan import PatchGAN
from autopainter.objective import Objective
from autopainter.pixels import network_input, to_unit
from autopainter.processor import fast_precision
from autopainter.trainer import Trainer, build_generator

Step = Callable[[int, Batch], Any]
WARM_UP_STEPS = 2
_PEAK_SIZES = {"cpu": 2048, "cuda": 8192}


class Plain:
    """The same objective as pix2pix's public code trains it (junyanz/pytorch-CycleGAN-and-pix2pix, `pix2pix_model.py`).

    Float32, channels first, eager, batch norm, plain dropout, true and painted images judged one after the other, Adam
    as PyTorch has it, no average.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.generator = build_generator(config).to(device)
        for block in self.generator.up:
            if isinstance(block.dropout, KeyedDropout):
                block.dropout = _Dropout(block.dropout.probability)
        self.discriminator = PatchGAN(config.model.discriminator_width, config.model.norm).to(device)
        initialise(self.discriminator, config.train.seed, 1)
        assert config.loss.vgg_weights is not None
        self.features = vgg.load(config.loss.vgg_weights, config.loss.feature_layer, config.loss.vgg_sha256).to(device)
        betas = config.train.beta1, config.train.beta2
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=config.train.learning_rate, betas=betas)
            for network in (self.generator, self.discriminator)
        ]

    def step(self, step: int, batch: Batch) -> torch.Tensor:
        """Discriminator's and generator's loss."""
        batch, loss = batch.to(self.device), self.config.loss
        condition, target = network_input(batch.sketch, batch.hint), to_unit(batch.color)
        painted = self.generator(condition, batch.dropout)

        self.discriminator.requires_grad_(True)
        self.optimizers[1].zero_grad()
        fake, real = self.discriminator(condition, painted.detach()), self.discriminator(condition, target)
        judged = losses.discriminator(real, fake, "gan")
        judged.backward()
        self.optimizers[1].step()

        self.discriminator.requires_grad_(False)
        self.optimizers[0].zero_grad()
        total: torch.Tensor = (
            loss.adversarial_weight * losses.generator_adversarial(self.discriminator(condition, painted), "gan")
            + loss.pixel_weight * losses.pixel(painted, target)
            + loss.feature_weight * losses.feature(self.features(painted), self.features(target))
            + loss.tv_weight * losses.total_variation(painted)
        )
        total.backward()
        self.optimizers[0].step()
        return torch.stack([judged.detach(), total.detach()])


class _Dropout(nn.Dropout):
    def forward(self, input: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(input)


class _JudgedApart(Objective):
    def _judge(self, condition: torch.Tensor, target: torch.Tensor, painted: torch.Tensor) -> list[torch.Tensor]:
        return [self._discriminator(condition, images) for images in (target, painted)]


class _TwoPasses(Trainer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.objective = _JudgedApart(self.config, self.device, self.discriminator, self.features)


class _WithGraph(Objective):
    def _feature_loss(self, painted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert self._features
        with self._autocast():
            return losses.feature(self._features(painted), self._features(target))


class _TargetsWithGraph(Trainer):
    """The weights of the feature network are left trainable, as they are when it is loaded."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        assert self.features
        self.features.requires_grad_(True)
        self.objective = _WithGraph(self.config, self.device, self.discriminator, self.features)


class _UnfusedAdam(Trainer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        betas = self.config.train.beta1, self.config.train.beta2
        for name, network in (("generator", self.generator), ("discriminator", self.discriminator)):
            self.optimizers[name] = Adam(network.named_parameters(), betas, fused=None)


class Variant(NamedTuple):
    """A way to do a step: who does it, and what it changes of the configuration."""

    step: type[Plain] | type[Trainer]
    settings: Mapping[str, object]
    text: str


_FLOAT32 = {"train.precision": "float32"}
_FIRST = {"train.channels_last": False}
VARIANTS = {
    "plain": Variant(Plain, {**_FLOAT32, **_FIRST, "model.norm": "batch"}, "pix2pix's recipe"),
    "float32": Variant(Trainer, {**_FLOAT32, **_FIRST}, "ours, float32, channels first"),
    "channels-last": Variant(Trainer, _FLOAT32, "+ channels last"),
    "bfloat16": Variant(Trainer, {}, "+ bfloat16: **the default**"),
    "compile": Variant(Trainer, {"train.compile": True}, "+ compile"),
    "batch-norm": Variant(Trainer, {"model.norm": "batch"}, "default, with batch norm"),
    "group-norm": Variant(Trainer, {"model.norm": "group"}, "default, with group norm"),
    "channels-first": Variant(Trainer, _FIRST, "default, but channels first"),
    "two-passes": Variant(_TwoPasses, {}, "default, but true and painted images judged apart"),
    "targets-with-graph": Variant(_TargetsWithGraph, {}, "default, but VGG's weights left trainable"),
    "unfused-adam": Variant(_UnfusedAdam, {}, "default, but Adam as PyTorch has it"),
    "outer": Variant(Trainer, {"train.activation_checkpointing": "outer"}, "default, two levels recomputed"),
    "all": Variant(Trainer, {"train.activation_checkpointing": "all"}, "default, all recomputed"),
}


def settings_of(variant: Variant, options: argparse.Namespace, features: Mapping[str, str]) -> Config:
    """The configuration of a variant."""
    coupled = variant.settings.get("model.norm") == "batch"  # it goes with no microbatch
    fields = {
        "data.image_size": options.size, "train.global_batch": options.batch or options.microbatch,
        "train.microbatch": "" if coupled else options.microbatch, **features, **variant.settings,
    }  # fmt: skip
    return bench_config(fields, options.set)


def random_features(folder: Path, layer: FeatureLayer) -> dict[str, str]:
    """Fields for a feature network with random weights: its time is that of the real one."""
    data = safetensors.torch.save(vgg.VGGFeatures(layer).state_dict())
    path = folder / f"random-{layer}.safetensors"
    path.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    return {"loss.feature_layer": layer, "loss.vgg_weights": str(path), "loss.vgg_sha256": sha256}


def random_batch(config: Config, step: int) -> Batch:
    """Pictures of random pixels, a tenth of them hinted."""
    generator = torch.Generator().manual_seed(step)
    count, size = config.train.global_batch, config.data.image_size
    pixels = torch.randint(0, 256, (count, 8, size, size), dtype=torch.uint8, generator=generator)
    mask = (pixels[:, 7:] > 230).to(torch.uint8)
    hint = torch.cat([pixels[:, 4:7] * mask, mask], dim=1)
    keys = torch.randint(0, 2**62, (count,), generator=generator)
    return Batch(step, [str(row) for row in range(count)], pixels[:, :1], pixels[:, 1:4], hint, keys)


# One process a variant


def work(variant: str, options: argparse.Namespace, features: Mapping[str, str], pipe: Connection) -> None:
    """Answer requests until the pipe is closed: ``steps`` does a turn, ``flops`` counts those of a step."""
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    chosen = VARIANTS[variant]
    config = settings_of(chosen, options, features)
    batches = [random_batch(config, step) for step in range(2)]
    before = psutil.Process().memory_info().rss
    doing = chosen.step(config, device)
    done = 0

    def turn(steps: int) -> float:
        nonlocal done
        synchronise(device)
        began = time.perf_counter()
        for _ in range(steps):
            doing.step(done, batches[done % 2])
            done += 1
        synchronise(device)
        return time.perf_counter() - began

    try:
        while True:
            match pipe.recv():
                case "flops":
                    with FlopCounterMode(display=False) as counter:
                        turn(1)
                    pipe.send(counter.get_total_flops())
                case "steps":
                    turn(WARM_UP_STEPS if done < WARM_UP_STEPS else 1)
                    reset_peak(device)
                    seconds = turn(options.steps)
                    pipe.send((seconds / options.steps, peak_bytes(device, before)))
                    if device.type == "cuda":
                        torch.cuda.empty_cache()  # for the others
    except EOFError:
        pass


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: torch.device) -> None:
    """Forget the largest use of memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device, before: int) -> int:
    """The largest use of memory since then."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - before


def matrix_rate(device: torch.device, threads: int) -> float:
    """Operations a second of a large matrix product in ``matrix_precision``: the best of some."""
    if device.type == "cpu":
        torch.set_num_threads(threads)
    size, dtype = _PEAK_SIZES[device.type], getattr(torch, matrix_precision(device))
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        synchronise(device)
        began = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def matrix_precision(device: torch.device) -> str:
    """What the device multiplies fastest in: cores without bfloat16 units emulate it, hundreds of times slower."""
    return "bfloat16" if device.type == "cuda" else fast_precision()


# All of them


def main() -> int:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", type=int, default=128, help="Edge of the images in pixels.")
    parser.add_argument("--microbatch", type=int, default=4, help="Images at once.")
    parser.add_argument("--batch", type=int, help="Images of a step; the microbatch if not given.")
    parser.add_argument("--feature-layer", default="relu2_2", help="As loss.feature_layer.")
    parser.add_argument("--threads", type=int, default=Groups().usable_cores(), help="On cores.")
    parser.add_argument("--rounds", type=int, default=5, help="Turns of each variant.")
    parser.add_argument("--steps", type=int, default=3, help="Steps of a turn.")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="For all, as in training.")
    parser.add_argument("--json", type=Path, help="Write all measurements there.")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench_step: --device cuda: torch finds no GPU here", file=sys.stderr)
        return 2
    if "plain" not in options.variants:
        options.variants.insert(0, "plain")

    spawn = multiprocessing.get_context("spawn")
    turns: dict[str, list[tuple[float, int]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        features = random_features(Path(folder), options.feature_layer)
        pipes = {}
        for name in options.variants:
            ours, theirs = spawn.Pipe()
            spawn.Process(target=work, args=(name, options, features, theirs), daemon=True).start()
            theirs.close()
            pipes[name] = ours

        def ask(name: str, what: str) -> Any:
            pipes[name].send(what)
            return pipes[name].recv()

        flops = ask("plain", "flops")
        for number in range(options.rounds + 1):  # the first one warms up and compiles
            for name in random.sample(options.variants, len(options.variants)):
                measured = ask(name, "steps")
                if number:
                    turns[name].append(measured)
                print(f"round {number}  {name:20} {measured[0]:8.3f} s a step", file=sys.stderr)
        rate = matrix_rate(device, options.threads)
        for pipe in pipes.values():
            pipe.close()
    print(table(turns, options, flops, rate))
    if options.json:
        options.json.write_text(json.dumps({"turns": turns, "flops": flops, "matrix_rate": rate}))
    return 0


def table(turns: Mapping[str, list[tuple[float, int]]], options: argparse.Namespace, flops: int, rate: float) -> str:
    """What was measured, as Markdown."""
    images = options.batch or options.microbatch
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{cpu()}, {options.threads} threads"
    lines = [
        f"{where}; torch {torch.__version__}; {options.size} px, {images} images a step, {options.microbatch} at once;"
        f" {flops / images / 1e9:.1f} GFLOP an image; matrix product {rate / 1e12:.2f} TFLOP/s in"
        f" {matrix_precision(torch.device(options.device))};"
        f" {options.rounds} rounds of {options.steps} steps",
        "",
        "| step | images/s, median (least - most) | of plain | of the matrix rate | peak memory, MiB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    plain = [seconds for seconds, _ in turns["plain"]]
    for name in options.variants:
        measured = turns[name]
        speeds = [images / seconds for seconds, _ in measured]
        ratio = statistics.median(base / seconds for base, (seconds, _) in zip(plain, measured, strict=True))
        median = statistics.median(speeds)
        lines.append(
            f"| {VARIANTS[name].text} | {median:.2f} ({min(speeds):.2f} - {max(speeds):.2f}) | {ratio:.2f} "
            f"| {median * flops / images / rate:.1%} | {max(peak for _, peak in measured) / 2**20:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
