"""The fields, by section, and the rules between them."""

import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml

from autopainter import uri
from autopainter.errors import UserError

Uri = Annotated[str, pydantic.AfterValidator(uri.place)]
FeatureLayer = Literal["relu2_2", "relu3_2", "relu4_3"]
Norm = Literal["instance", "batch", "group"]
Upsampling = Literal["transposed", "resize"]
Adversarial = Literal["gan", "lsgan", "hinge", "wgan-gp"]
Recompute = Literal["none", "outer", "all"]


class Section(pydantic.BaseModel):
    """Base of all sections: frozen, and an unknown field is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *typing.get_args(kind)):
            raise ValueError(f"must not be a truth value, got {value}")
        return value


class Run(Section):
    """Where the run lives."""

    name: str = pydantic.Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")
    """Name of the run. The same name continues the same run."""
    storage: Uri
    """Folder or s3:// URI under which runs are kept; this run is STORAGE/NAME."""

    @property
    def uri(self) -> str:
        """Where checkpoints and events of this run are."""
        return f"{self.storage.rstrip('/')}/{self.name}"


class Data(Section):
    """What is trained on and how it is streamed."""

    manifest: Uri
    """Path or s3:// URI of a manifest.json that `autopainter pack` wrote."""
    image_size: int = pydantic.Field(512, ge=32, le=2048, multiple_of=32)
    """Edge of the square training images in pixels."""
    crop_min: float = pydantic.Field(512 / 530, gt=0, le=1)
    """Smallest edge of the random square crop, as a share of a picture's shorter edge (the authors: 512 of 530)."""
    crop_max: float = pydantic.Field(512 / 530, gt=0, le=1)
    """Largest edge of the random crop; crop_min 0.6 and crop_max 1 make a random resized crop."""
    flip: bool = True
    """Mirror half of the samples."""
    color_jitter: float = pydantic.Field(0.0, ge=0, le=1)
    """Random change of hue, saturation and contrast, of the contrast of the drawing alike; 0: none."""
    lanes: int | None = pydantic.Field(None, ge=1)
    """Parallel chunk sequences of the sample order; none: train.global_batch. Part of the order."""
    block_chunks: int = pydantic.Field(2, ge=1, le=64)
    """Chunks of a lane whose samples are shuffled together. Part of the order; memory grows with it."""
    prefetch_batches: int = pydantic.Field(4, ge=1, le=64)
    """Batches decoded ahead."""
    fetch_ahead_batches: int = pydantic.Field(16, ge=0, le=1024)
    """Batches, beyond those, whose chunks are fetched ahead: all lanes come to new chunks at nearly the same step."""
    fetch_threads: int = pydantic.Field(8, ge=1, le=64)
    """Threads that fetch chunks, in each worker."""
    decode_threads: int = pydantic.Field(2, ge=1, le=64)
    """Threads that decode and augment samples, in each worker."""
    cache: Uri | None = None
    """Folder on a node's own disk where its workers keep the chunks that they fetched; none: nothing is kept."""
    cache_gib: float = pydantic.Field(50, gt=0)
    """Most that is kept there, in GiB; what is over it is fetched again in each epoch."""


class Sketch(Section):
    """Where the drawings come from; the parameters are those of XDoG for drawings made on the fly (docs/data.md)."""

    mode: Literal["stored", "on_the_fly"] = "stored"
    """Use the stored drawings, or make new ones at each step, so that no two epochs show the same lines."""
    sigma: float = pydantic.Field(1.5, ge=0.2, le=20)
    """Standard deviation of the narrow Gaussian in pixels of the training image: the scale of the lines."""
    k: float = pydantic.Field(2.0, gt=1, le=10)
    """Ratio of the wide Gaussian to the narrow one."""
    gamma: float = pydantic.Field(0.97, gt=0, le=1.1)
    """Weight of the wide Gaussian; nearer to 1 draws fainter edges too."""
    phi: float = pydantic.Field(200.0, gt=0, le=1e6)
    """Steepness of the threshold per grey level: a step at 200, soft lines near 0.1."""
    epsilon: float = pydantic.Field(0.1, ge=-255, le=255)
    """Threshold in grey levels."""
    sharpness: float = pydantic.Field(3.0, gt=0, le=100)
    """Factor of the sharpening before the filter; 1 changes nothing."""
    jitter: float = pydantic.Field(0.5, ge=0, le=1)
    """How far scale, faintness and softness of the lines vary from sample to sample."""


class Hints(Section):
    """Colour hints drawn from the target during training."""

    unhinted: float = pydantic.Field(0.3, ge=0, le=1)
    """Share of the samples that get no hint, so that the model also paints without any."""
    recolored: float = pydantic.Field(0.5, ge=0, le=1)
    """Share of the hinted samples whose hues are turned at random, hints and target alike: so the model follows colours
    that the pictures seldom have, and still knows the usual ones where there is no hint."""
    max_blocks: int = pydantic.Field(12, ge=0, le=200)
    """A hinted sample gets 0 to this many blurred colour blocks."""
    max_strokes: int = pydantic.Field(6, ge=0, le=50)
    """A hinted sample gets 0 to this many strokes."""


class Model(Section):
    """Generator and discriminator."""

    generator_width: int = pydantic.Field(64, ge=4, le=512)
    """Channels of the first U-Net level; doubled at each level up to eight times."""
    discriminator_width: int = pydantic.Field(64, ge=4, le=512)
    """Channels of the first PatchGAN layer."""
    norm: Norm = "instance"
    """Normalisation; `batch` couples the samples that are computed at once, so it goes with neither microbatches nor
    recomputation nor several workers on CPUs; the others do not."""
    dropout: float = pydantic.Field(0.5, ge=0, lt=1)
    """Dropout in the three innermost decoder blocks (pix2pix, arXiv 1611.07004, appendix 6.1)."""
    upsampling: Upsampling = "transposed"
    """Decoder: 4x4 transposed convolutions, or nearest pixels and a 3x3 convolution, which cannot leave a checkerboard
    (Odena et al. 2016)."""


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "pixel_weight": 100.0, "feature_weight": 0.01, "adversarial_weight": 1.0, "tv_weight": 90.0,
        "feature_layer": "relu2_2",
    },
    "authors": {
        "pixel_weight": 50.0, "feature_weight": 0.001, "adversarial_weight": 1.0, "tv_weight": 700.0,
        "feature_layer": "relu3_2",
    },
}  # fmt: skip
"""Weights of others, converted to the units of our terms (docs/training.md, "The objective")."""


class Loss(Section):
    """The four terms; every reduction is a mean, so the weights do not depend on the image size."""

    preset: Literal["ours", "paper", "authors"] = "ours"
    """Weights for the fields that are not set: these defaults, those of the paper, or those of its authors' code."""
    adversarial: Adversarial = "gan"
    """Kind of adversarial loss; `gan` is the non-saturating one, `wgan-gp` that of the journal version."""
    critic_steps: int = pydantic.Field(1, ge=1, le=100)
    """Steps of the discriminator for each one of the generator, which learns in the last of them (5 in Gulrajani et al.
    2017, algorithm 1)."""
    penalty_weight: float = pydantic.Field(10.0, gt=0)
    """Weight of the gradient penalty of `wgan-gp` (lambda in Gulrajani et al. 2017, equation 3)."""
    pixel_weight: float = pydantic.Field(100.0, ge=0)
    """Weight of the mean absolute pixel difference in [-1, 1] units."""
    feature_weight: float = pydantic.Field(0.01, ge=0)
    """Weight of the mean squared VGG feature difference, inputs normalised as ImageNet."""
    adversarial_weight: float = pydantic.Field(1.0, ge=0)
    """Weight of the generator's adversarial term."""
    tv_weight: float = pydantic.Field(10.0, ge=0)
    """Weight of the mean total variation, of what tv_of says."""
    tv_of: Literal["painted", "error"] = "painted"
    """The total variation is that of the painted image (the paper's), or of its difference from the target, which evens
    out blotches alike and leaves the target's own edges alone."""
    tv_growth: float = pydantic.Field(1.0, ge=0)
    """tv_weight becomes this many times as large, linearly, while the learning rate falls (train.decay_from)."""
    feature_layer: FeatureLayer = "relu2_2"
    """VGG16 layer phi of the feature term; relu2_2 follows its 4th convolution."""
    vgg_weights: Uri | None = None
    """Path, s3:// or https:// URI of the weights that `autopainter vgg` writes; needed if feature_weight > 0."""
    vgg_sha256: str | None = pydantic.Field(None, pattern="^[0-9a-f]{64}$")
    """Checksum that vgg_weights must have; none: the pinned one of feature_layer."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _of_preset(cls, fields: Any) -> Any:
        if isinstance(fields, Mapping) and isinstance(name := fields.get("preset"), str):
            return {**PRESETS.get(name, {}), **fields}
        return fields


def _run_and_step(text: str) -> str:
    run, at, step = text.rpartition("@")
    if at and not (run and step.isdigit()):
        raise ValueError(f"{step!r} is no step; write RUN or RUN@STEP, such as s3://autopainter/runs/name@1200")
    uri.place(run or text)
    return text


class Train(Section):
    """The optimisation."""

    seed: int = pydantic.Field(0, ge=0, lt=2**63)
    """Seed of everything random."""
    steps: int = pydantic.Field(ge=1)
    """Training ends after this many steps of one global batch."""
    global_batch: int = pydantic.Field(16, ge=1)
    """Images of one step over all workers: a hyperparameter."""
    microbatch: int | None = pydantic.Field(None, ge=1)
    """Images that a worker computes at once: a memory knob that changes no result; none: its whole share."""
    init_from: Annotated[str, pydantic.AfterValidator(_run_and_step)] | None = None
    """Begin with the weights of another run, RUN or RUN@STEP; none: with random ones."""
    learning_rate: float = pydantic.Field(2e-4, gt=0)
    """Adam's step size for both networks (pix2pix, appendix 6.2)."""
    warmup_steps: int = pydantic.Field(0, ge=0)
    """Steps over which the learning rate rises linearly to its value."""
    decay_from: int | None = pydantic.Field(None, ge=0)
    """Step from which on the learning rate falls linearly, to 0 after train.steps (pix2pix's code: the second half);
    none: it stays."""
    clip_norm: float | None = pydantic.Field(None, gt=0)
    """A longer gradient of a network is scaled to this norm; none: no gradient is."""
    beta1: float = pydantic.Field(0.5, ge=0, lt=1)
    """Adam's decay of the first moment."""
    beta2: float = pydantic.Field(0.999, ge=0, lt=1)
    """Adam's decay of the second moment."""
    ema_decay: float = pydantic.Field(0.999, ge=0, lt=1)
    """Decay of the moving average of the generator that is used for painting."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Arithmetic of the networks; losses, weights and optimiser are float32 always."""
    channels_last: bool = True
    """Memory order of the activations."""
    compile: bool = False
    """Let torch.compile fuse the networks' operations, after a slower start: meant for GPUs, and slower on cores; it
    needs a C++ compiler."""
    activation_checkpointing: Recompute = "none"
    """U-Net blocks recomputed in the backward pass: none, the two largest levels, or all."""
    threads: int | None = pydantic.Field(None, ge=1)
    """CPU threads of a worker; none: its share of the cores that the machine, or a container's limit, allows."""


class Checkpoint(Section):
    """When the state is saved."""

    every_seconds: float = pydantic.Field(300, ge=0)
    """Time between checkpoints; 0 saves at every step."""
    keep: int = pydantic.Field(3, ge=1)
    """Newest checkpoints that are kept."""
    keep_best: int = pydantic.Field(1, ge=0)
    """Checkpoints that are kept beside them for the best validation scores (PSNR with hints)."""
    max_age_seconds: float = pydantic.Field(3600, gt=0)
    """The run stops if no checkpoint could be saved for so long."""


class Telemetry(Section):
    """What the run shows."""

    log_every_steps: int = pydantic.Field(10, ge=1)
    """Steps between scalars."""
    image_every_steps: int = pydantic.Field(500, ge=1)
    """Steps between validation grids and scores."""
    images: int = pydantic.Field(8, ge=1, le=64)
    """Validation samples in a grid."""
    upload_seconds: float = pydantic.Field(30, gt=0)
    """Time between uploads of the event file (each uploads the whole file)."""
    prometheus_port: int = pydantic.Field(0, ge=0, le=65535)
    """Port of the metrics endpoint that the first worker of each machine opens; 0: none."""
    prometheus_host: str = "0.0.0.0"
    """Address that the metrics endpoint listens on; 127.0.0.1 hides it from the network."""
    metrics_folder: Uri | None = None
    """Folder where the workers of a machine keep their metrics, for `autopainter metrics`; none: a temporary one."""


class Cluster(Section):
    """How the run is spread; used by job/train.py, where one worker is one process."""

    workers: int = pydantic.Field(1, ge=1)
    """Worker processes: one a GPU, or any number on CPUs."""
    gpus: bool | None = None
    """One GPU for each worker, which a run waits for; none: if the cluster has any when the run is started."""
    cpus_per_worker: float = pydantic.Field(1, gt=0)
    """CPU cores that Ray reserves for a worker."""
    max_failures: int = pydantic.Field(20, ge=0)
    """The run ends when the workers fail more often than this without a new checkpoint in between."""
    collective_timeout_seconds: float = pydantic.Field(300, gt=0)
    """A worker that does not answer for so long is taken for dead."""
    stop_seconds: float = pydantic.Field(100, gt=0)
    """Time that workers have for their last checkpoint after a request to stop."""


class Config(Section):
    """Everything that decides what a run computes."""

    run: Run
    data: Data
    sketch: Sketch = pydantic.Field(default_factory=Sketch)
    hints: Hints = pydantic.Field(default_factory=Hints)
    model: Model = pydantic.Field(default_factory=Model)
    loss: Loss = pydantic.Field(default_factory=Loss)
    train: Train
    checkpoint: Checkpoint = pydantic.Field(default_factory=Checkpoint)
    telemetry: Telemetry = pydantic.Field(default_factory=Telemetry)
    cluster: Cluster = pydantic.Field(default_factory=Cluster)

    @pydantic.model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.data.crop_min > self.data.crop_max:
            raise ValueError(f"data.crop_min: {self.data.crop_min} is above data.crop_max {self.data.crop_max}")
        if self.checkpoint.max_age_seconds <= self.checkpoint.every_seconds:
            raise ValueError(
                f"checkpoint.max_age_seconds: {self.checkpoint.max_age_seconds:g} must be above"
                f" checkpoint.every_seconds {self.checkpoint.every_seconds:g}"
            )
        if self.loss.feature_weight > 0 and not self.loss.vgg_weights:
            raise ValueError(
                "loss.vgg_weights: needed because loss.feature_weight is above 0;"
                " name the file that 'autopainter vgg --output FILE' makes, or set loss.feature_weight to 0"
            )
        if self.loss.adversarial == "wgan-gp" and self.model.norm == "batch":
            raise ValueError(
                "model.norm: batch couples the samples whose gradients wgan-gp penalises one by one;"
                " use instance or group"
            )
        if self.model.norm == "batch":
            self._check_batch_norm()
        for name, steps in (
            ("train.steps", self.train.steps),
            ("telemetry.log_every_steps", self.telemetry.log_every_steps),
        ):
            if steps % self.loss.critic_steps:
                raise ValueError(
                    f"{name}: {steps} is no multiple of loss.critic_steps {self.loss.critic_steps};"
                    f" nearest right value: {-(-steps // self.loss.critic_steps) * self.loss.critic_steps}"
                )
        if self.train.decay_from is not None and self.train.decay_from >= self.train.steps:
            raise ValueError(f"train.decay_from: {self.train.decay_from} must be below train.steps {self.train.steps}")
        if self.loss.tv_growth != 1 and self.train.decay_from is None:
            raise ValueError(
                f"loss.tv_growth: {self.loss.tv_growth:g} needs train.decay_from, the step from which it changes the"
                " weight; set it, or leave loss.tv_growth at 1"
            )
        return self

    def _check_batch_norm(self) -> None:
        """Refuse what would change a result that it must not change."""
        instead = "or use model.norm instance or group"
        if self.train.microbatch:
            raise ValueError(
                f"train.microbatch: {self.train.microbatch}, but batch norm's statistics are those of the images that"
                f" are computed at once; leave it out, {instead}"
            )
        if self.train.activation_checkpointing != "none":
            raise ValueError(
                f"train.activation_checkpointing: {self.train.activation_checkpointing} counts batch norm's statistics"
                f" twice; set it to none, {instead}"
            )
        if self.cluster.workers > 1 and self.cluster.gpus is False:
            raise ValueError(
                f"cluster.workers: {self.cluster.workers} with cluster.gpus false, but batch norm is synchronised over"
                f" workers on GPUs only; set it to 1, {instead}"
            )

    def check_world(self, world: int, origin: str) -> None:
        """Check that the batch can be shared by ``world`` workers.

        Raises:
            UserError: it cannot; the message names the nearest batch that can.
        """
        batch = self.train.global_batch
        if batch % world:
            below, above = batch // world * world, -(-batch // world) * world
            nearest = f"{below} or {above}" if below else str(above)
            raise UserError(
                f"train.global_batch: {batch} is not divisible by {origin} {world}; nearest right values: {nearest}"
            )
        share = batch // world
        if self.train.microbatch and share % self.train.microbatch:
            divisor = max(d for d in range(1, min(share, self.train.microbatch) + 1) if share % d == 0)
            raise UserError(
                f"train.microbatch: {self.train.microbatch} does not divide the {share} images of a worker"
                f" (train.global_batch {batch} over {world}); nearest right value: {divisor}"
            )

    def identity(self) -> dict[str, Any]:
        """The fields, by dotted name, that must stay as they are for a run to be continued."""
        fixed = set()
        if self.train.decay_from is not None:
            fixed.add("train.steps")  # the learning rate falls towards it
        return {
            name: value
            for name, value in flatten(self.model_dump(mode="json")).items()
            if name in fixed or not may_change(name)
        }

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that ``load`` reads again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


_MAY_CHANGE = {
    "run", "checkpoint", "telemetry", "cluster",
    "data.manifest",  # its content is compared by the data set's id instead
    "data.prefetch_batches", "data.fetch_ahead_batches", "data.fetch_threads", "data.decode_threads", "data.cache",
    "data.cache_gib",
    "loss.vgg_weights",
    "train.steps", "train.microbatch", "train.channels_last", "train.compile", "train.activation_checkpointing",
    "train.threads",
}  # fmt: skip


def may_change(name: str) -> bool:
    """Whether a run may be continued with another value of a field."""
    return name in _MAY_CHANGE or name.split(".")[0] in _MAY_CHANGE


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
