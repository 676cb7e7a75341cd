"""The streams that ``bench_stream.py`` compares: one measure of one of them in a process of its own.

It runs in our environment for ours and in that of ``peers.txt`` for the others, so autopainter is imported only where
ours begins. ``peers.py SPEC`` prints JSON lines: marks while it measures, then one result. Times leave out imports.
"""

import dataclasses
import importlib
import importlib.metadata
import itertools
import json
import math
import pickle
import sys
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import PIL.Image
import torch

SHUFFLE_SAMPLES = 1000
"""Shuffle buffer of webdataset, in samples; the one of its documentation."""

Batch = tuple[Sequence[str], Any, Any]
"""Keys, colour pictures, sketches: uint8 tensors [B, 3, S, S] and [B, 1, S, S], or lists of encoded bytes."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """One measure of one stream.

    Attributes:
        system: one of ``STREAMS``.
        measure: one of ``MEASURES``.
        parallel: worker processes of the peers' loaders; threads of ours.
        decode: deliver pixels instead of encoded bytes.
        batch: samples of a batch.
        size: edge of the delivered pictures in pixels.
        crop_share: edge of the random crop, as a share of the picture's.
        samples: of one epoch.
        shards: names of the tars that ours and webdataset read.
        uri: s3:// prefix of the three data sets.
        scratch: empty folder, for the caches of those that need one.
        state: file that ``audit`` leaves for ``resume``.
        check: read on after resuming, to compare the order of the rest of the epoch.
    """

    system: str
    measure: str
    parallel: int
    decode: bool
    batch: int
    size: int
    crop_share: float
    samples: int
    shards: list[str]
    uri: str
    scratch: str
    state: str
    check: bool = False

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return math.ceil(self.samples / self.batch)

    @property
    def middle(self) -> int:
        """Batches before a resumption; even, as webdataset begins again with the first of its workers."""
        return self.batches // 4 * 2


class Stream(Protocol):
    """A stream that stands at the beginning of an epoch, or where ``state`` was taken."""

    def epoch(self) -> Iterator[Batch]:
        """The rest of this epoch; called again, the next one."""

    def state(self) -> Any:
        """What it takes to continue behind the last batch, in a new process."""


def decode_color(data: bytes) -> Any:
    """uint8 [H, W, 3] RGB of a JPEG."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


def decode_sketch(data: bytes) -> Any:
    """uint8 [H, W] of a PNG."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)


class Collate:
    """A peer's batch out of samples (key, colour, sketch): the same work for a sample as ``data.samples`` of ours."""

    def __init__(self, spec: Spec, decoded: bool) -> None:
        self.spec, self.decoded = spec, decoded
        self.random = np.random.default_rng(0)

    def __call__(self, samples: Sequence[Any]) -> Batch:
        rows = [(row["key"], row["color"], row["sketch"]) if isinstance(row, dict) else row for row in samples]
        keys, colors, sketches = zip(*rows, strict=True)
        if not self.spec.decode:
            return keys, list(map(bytes, colors)), list(map(bytes, sketches))  # LitData's are views, and cannot travel
        if not self.decoded:
            colors, sketches = tuple(map(decode_color, colors)), tuple(map(decode_sketch, sketches))
        pairs = [self._augment(color, sketch) for color, sketch in zip(colors, sketches, strict=True)]
        return keys, torch.stack([color for color, _ in pairs]), torch.stack([sketch for _, sketch in pairs])

    def _augment(self, color: Any, sketch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        edge = round(sketch.shape[0] * self.spec.crop_share)
        top, left = self.random.integers(sketch.shape[0] - edge + 1, size=2)
        window = (slice(top, top + edge), slice(left, left + edge))
        color, sketch = self._resize(color[window]), self._resize(sketch[window])
        if self.random.random() < 0.5:
            color, sketch = color[:, ::-1], sketch[:, ::-1]
        pixels = np.ascontiguousarray(color.transpose(2, 0, 1)), np.ascontiguousarray(sketch[None])
        return torch.from_numpy(pixels[0]), torch.from_numpy(pixels[1])

    def _resize(self, image: Any) -> Any:
        size = self.spec.size
        if image.shape[0] == size:
            return image
        filter = cv2.INTER_AREA if image.shape[0] > size else cv2.INTER_CUBIC
        return cv2.resize(image, (size, size), interpolation=filter)


class PillowCollate(Collate):
    """The same with Pillow, as torchvision's RandomCrop, Resize, RandomHorizontalFlip and PILToTensor do it."""

    def _augment(self, color: Any, sketch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        edge = round(sketch.height * self.spec.crop_share)
        top, left = (int(at) for at in self.random.integers(sketch.height - edge + 1, size=2))
        mirrored = self.random.random() < 0.5

        def view(image: Any) -> torch.Tensor:
            image = image.crop((left, top, left + edge, top + edge))
            image = image.resize((self.spec.size, self.spec.size), PIL.Image.Resampling.BILINEAR)
            if mirrored:
                image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = np.atleast_3d(np.array(image))
            return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

        return view(color), view(sketch)


class Ours:
    """TrainingStream, without hints, which the others do not draw."""

    def __init__(self, spec: Spec, state: int | None) -> None:
        from autopainter import config
        from autopainter.data import manifest, stream

        settings = ["run.name=bench", f"run.storage={spec.scratch}", "train.steps=1000000", "loss.feature_weight=0"]
        settings += [f"data.manifest={spec.uri}/ours/manifest.json", f"data.image_size={spec.size}"]
        settings += [f"data.crop_min={spec.crop_share}", f"data.crop_max={spec.crop_share}", "hints.unhinted=1.0"]
        settings += [f"train.global_batch={spec.batch}", f"data.decode_threads={spec.parallel}"]
        settings += [f"data.cache={spec.scratch}/cache"] if spec.system == "ours-cached" else []
        self.spec, self.step = spec, state or 0
        self.config = config.load(None, settings, {})
        self.stream = stream.TrainingStream(manifest.load(self.config.data.manifest), self.config, 0, 1, self.step)

    def epoch(self) -> Iterator[Batch]:
        if not self.spec.decode:
            yield from self._fetch()
            return
        while True:
            batch = next(self.stream)
            left = self.spec.samples - self.step % self.spec.batches * self.spec.batch
            self.step += 1
            yield batch.keys[:left], batch.color[:left], batch.sketch[:left]  # a last one goes on into the next epoch
            if self.step % self.spec.batches == 0:
                return

    def state(self) -> int:
        return self.step

    def _fetch(self) -> Iterator[Batch]:
        """The encoded samples in the order of the stream, fetched as far ahead as the stream does."""
        from autopainter.data import plan

        split, data, size = self.stream.split, self.config.data, self.spec.batch
        steps = itertools.islice(plan.steps(self.stream.order, size, 0, 1, 0), self.spec.batches)
        chunks: dict[int, Future[bytes]] = {}
        planned: deque[list[Any]] = deque()
        with ThreadPoolExecutor(self.spec.parallel) as fetchers:
            while True:
                missing = data.prefetch_batches + data.fetch_ahead_batches - len(planned)
                for step, places in itertools.islice(steps, missing):
                    planned.append(places[: self.spec.samples - step * size])
                    for place in planned[-1]:
                        if place.chunk not in chunks:
                            chunks[place.chunk] = fetchers.submit(split.fetch, place.chunk)
                if not planned:
                    return
                rows = [encoded(split, place.sample, place.chunk, chunks[place.chunk].result()) for place in planned[0]]
                for place in planned.popleft():
                    if place.last:
                        del chunks[place.chunk]
                keys, colors, sketches = zip(*rows, strict=True)
                yield keys, colors, sketches


def encoded(split: Any, index: int, chunk_index: int, chunk_data: bytes) -> tuple[str, bytes, bytes]:
    """Key, JPEG and PNG of a sample of ours, out of its chunk."""
    sample, start = split.sample(index), split.chunks[chunk_index][1].start
    color, sketch = (chunk_data[at - start : at - start + length] for at, length in (sample.color, sample.sketch))
    return sample.key, color, sketch


class WebDataset:
    """webdataset's own pipeline, with Pillow as its README has it, or with OpenCV as ours.

    It has no state, so a new one reads and drops what was delivered, without decoding.
    """

    def __init__(self, spec: Spec, state: int | None) -> None:
        import boto3
        import botocore.config
        import webdataset as wds

        self.spec, self.skip, self.delivered = spec, state or 0, 0
        # Its pipe from curl is 8 % faster than a boto3 stream registered with gopen.
        bucket, _, prefix = spec.uri.removeprefix("s3://").partition("/")
        objects = [{"Bucket": bucket, "Key": f"{prefix}/ours/{name}"} for name in spec.shards]
        client = boto3.client("s3", config=botocore.config.Config(signature_version="s3v4"))
        urls = [client.generate_presigned_url("get_object", Params=params, ExpiresIn=86400) for params in objects]
        dataset = wds.WebDataset(urls, shardshuffle=len(urls), detshuffle=True, seed=0, nodesplitter=wds.split_by_node)
        # Not .shuffle(), which replays one order in all epochs if it has a seed and none if it has not.
        dataset = dataset.compose(wds.filters.detshuffle(bufsize=SHUFFLE_SAMPLES, seed=0)).compose(self._drop)
        if spec.decode:
            images = {"color.jpg": decode_color, "sketch.png": decode_sketch}
            if spec.system == "webdataset":  # as its README has it: decode("pil"), then transforms of Pillow's images
                own = wds.autodecode.ImageHandler
                handlers = [own("pil", ["jpg"]), own("pill", ["png"])]
            else:
                handlers = [wds.handle_extension(suffix, function) for suffix, function in images.items()]
            dataset = dataset.decode(*handlers, only=list(images))
        dataset = dataset.to_tuple("__key__", "color.jpg", "sketch.png")
        collate = PillowCollate if spec.decode and spec.system == "webdataset" else Collate
        dataset = dataset.batched(spec.batch, collation_fn=collate(spec, decoded=True))
        self.loader = wds.WebLoader(dataset, batch_size=None, num_workers=spec.parallel)

    def _drop(self, samples: Iterator[Any]) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for _ in range(len(range(number, self.skip, workers)) * self.spec.batch):
            next(samples)
        yield from samples

    def epoch(self) -> Iterator[Batch]:
        for batch in self.loader:
            self.delivered += 1
            yield batch

    def state(self) -> int:
        return self.delivered


class Stateful:
    """A stream whose loader says where it stands."""

    def __init__(self, loader: Any, state: Any) -> None:
        self.loader = loader
        if state is not None:
            loader.load_state_dict(state)

    def epoch(self) -> Iterator[Batch]:
        yield from self.loader

    def state(self) -> Any:
        return self.loader.state_dict()


class Mosaic(Stateful):
    """MosaicML Streaming."""

    def __init__(self, spec: Spec, state: Any) -> None:
        import streaming  # type: ignore[import-not-found, unused-ignore]

        dataset = streaming.StreamingDataset(
            remote=f"{spec.uri}/mosaic", local=f"{spec.scratch}/cache", shuffle=True, batch_size=spec.batch
        )
        # It opens a connection before it forks its workers, which would then talk on it at once and wait for a minute.
        for source in dataset.streams:
            source._downloader.clean_up()
        loader = streaming.StreamingDataLoader(
            dataset, batch_size=spec.batch, num_workers=spec.parallel, collate_fn=Collate(spec, decoded=False)
        )
        super().__init__(loader, state)


class LitData(Stateful):
    """LitData."""

    def __init__(self, spec: Spec, state: Any) -> None:
        import litdata  # type: ignore[import-not-found, unused-ignore]

        # The server here has no TLS, which LitData's own client refuses and gives no setting for.
        litdata.streaming.downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
        dataset = litdata.StreamingDataset(f"{spec.uri}/litdata", cache_dir=f"{spec.scratch}/cache", shuffle=True)
        loader = litdata.StreamingDataLoader(
            dataset, batch_size=spec.batch, num_workers=spec.parallel, collate_fn=Collate(spec, decoded=False)
        )
        super().__init__(loader, state)


STREAMS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "ours": (Ours, ("autopainter.data.stream", "autopainter.storage.s3")),
    "ours-cached": (Ours, ("autopainter.data.stream", "autopainter.storage.s3")),
    "webdataset": (WebDataset, ("webdataset", "PIL.Image", "boto3.session", "botocore.httpsession")),
    "webdataset-opencv": (WebDataset, ("webdataset", "boto3.session", "botocore.httpsession")),
    "mosaic": (Mosaic, ("streaming", "boto3.s3.transfer", "botocore.httpsession")),
    "litdata": (LitData, ("litdata", "obstore.store", "boto3.s3.transfer", "botocore.httpsession")),
}
"""Each stream with the modules that it would otherwise import while it is timed."""


def _mend_torchvision() -> None:
    """Let torchvision, which MosaicML imports and does not need here, be imported.

    That of PyPI is built for CUDA: beside a CPU build of torch its operators are missing, and it stumbles over two.
    """
    if torch.version.cuda is None and not importlib.metadata.version("torchvision").endswith("+cpu"):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


def convert(tars: list[str], folder: str) -> None:
    """Write the same encoded bytes, in shards of the same size, in the formats of the peers."""
    import litdata  # type: ignore[import-not-found, unused-ignore]

    _mend_torchvision()
    import streaming  # type: ignore[import-not-found, unused-ignore]

    columns = {"key": "str", "color": "bytes", "sketch": "bytes"}
    limit = max(Path(tar).stat().st_size for tar in tars)
    with streaming.MDSWriter(out=f"{folder}/mosaic", columns=columns, size_limit=limit) as writer:
        for tar in tars:
            for sample in samples_of(tar):
                writer.write(sample)
    most = max(sum(1 for _ in samples_of(tar)) for tar in tars)
    litdata.optimize(
        samples_of, inputs=tars, output_dir=f"{folder}/litdata", chunk_size=most, num_workers=1, verbose=False
    )


def samples_of(tar: str) -> Iterator[dict[str, Any]]:
    """The samples of a shard that ``autopainter pack`` wrote, still encoded."""
    with tarfile.open(tar) as members:
        color: Any = None
        for member in members:
            key, _, suffix = member.name.partition(".")
            if suffix == "color.jpg":
                color = members.extractfile(member)
            elif suffix == "sketch.png":  # the last one of its sample
                sketch: Any = members.extractfile(member)
                yield {"key": key, "color": color.read(), "sketch": sketch.read()}


def _say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def rate(spec: Spec, open_stream: Callable[[Any], Stream]) -> None:
    """Samples per second over a whole epoch, its start included: what was fetched ahead by then counts as time too."""
    began, samples, size = time.perf_counter(), 0, 0
    for keys, color, sketch in open_stream(None).epoch():
        samples += len(keys)
        size += sum(map(len, color)) + sum(map(len, sketch)) if not spec.decode else color.nbytes + sketch.nbytes
    _say(result=samples / (time.perf_counter() - began), bytes=size)


def start(spec: Spec, open_stream: Callable[[Any], Stream]) -> None:
    """Seconds to the first batch of a run."""
    began = time.perf_counter()
    _, color, sketch = next(open_stream(None).epoch())
    _say(result=time.perf_counter() - began)
    assert (color.dtype, sketch.dtype) == (torch.uint8, torch.uint8)
    assert color.shape == (spec.batch, 3, spec.size, spec.size), color.shape
    assert sketch.shape == (spec.batch, 1, spec.size, spec.size), sketch.shape


def audit(spec: Spec, open_stream: Callable[[Any], Stream]) -> None:
    """Two epochs, a mark behind each; the first one's order, and the state in the middle of it, go to a file."""
    stream = open_stream(None)
    order: list[str] = []
    state = None
    for number in range(2):
        for delivered, batch in enumerate(stream.epoch(), 1):
            if number == 0:
                order += batch[0]
                state = stream.state() if delivered == spec.middle else state
        _say(mark=number)
    Path(spec.state).write_bytes(pickle.dumps({"order": order, "state": state}))
    _say(result=None, missing=spec.samples - len(set(order)), repeated=len(order) - len(set(order)))


def resume(spec: Spec, open_stream: Callable[[Any], Stream]) -> None:
    """Seconds to the first batch of a run that goes on in the middle of an epoch, and whether it is the right one."""
    saved = pickle.loads(Path(spec.state).read_bytes())
    began = time.perf_counter()
    batches = open_stream(saved["state"]).epoch()
    order = list(next(batches)[0])
    seconds = time.perf_counter() - began
    expected = saved["order"][spec.middle * spec.batch :]
    if spec.check:
        for batch in batches:
            order += batch[0]
    else:
        expected = expected[: len(order)]
    _say(result=seconds, same=order == expected, set=set(order) == set(expected))


MEASURES: dict[str, Callable[[Spec, Callable[[Any], Stream]], None]] = {
    "audit": audit, "fetched": rate, "decoded": rate, "start": start, "resume": resume,
}  # fmt: skip
"""In their order: ``audit``, which is not timed, warms the storage and leaves the state to resume from."""


def main(text: str) -> None:
    """Import, then measure."""
    request = json.loads(text)
    if "convert" in request:
        convert(request["convert"], request["folder"])
        return
    spec = Spec(**request)
    stream, modules = STREAMS[spec.system]
    if stream is Mosaic:
        _mend_torchvision()
    for module in modules:
        importlib.import_module(module)
    cv2.setNumThreads(1)
    MEASURES[spec.measure](spec, lambda state: stream(spec, state))


if __name__ == "__main__":
    main(sys.argv[1])
