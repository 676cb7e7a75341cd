"""Checks of what a configuration names: workers, data set, feature weights."""

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from autopainter.config import Config
from autopainter.data import manifest as manifests
from autopainter.data.manifest import Manifest
from autopainter.doctor.advice import advise, is_about_content
from autopainter.doctor.findings import Finding, failed, ok, one_line, skipped
from autopainter.doctor.limits import with_store, within
from autopainter.errors import UserError
from autopainter.uri import split

_PACK_AGAIN = "pack the data set again with 'autopainter pack', or correct data.manifest"
_SLOWEST_BYTES_PER_SECOND = 1e6
"""A large object may take as long as this, beside the usual time."""

T = TypeVar("T")


def check_workers(config: Config) -> Iterator[Finding]:
    """Check that the workers can share a batch."""
    workers, batch = config.cluster.workers, config.train.global_batch
    try:
        config.check_world(workers, "cluster.workers")
    except UserError as error:
        yield failed("workers", one_line(error), "set the field to one of the values that the detail names")
        return
    yield ok("workers", f"{workers}, each with {batch // workers} of the {batch} images of a batch")


def check_data(config: Config, seconds: float) -> Iterator[Finding]:
    """Check the manifest, that all its shards are there, and that the first chunk of each split is whole."""
    check, uri = "data.manifest", config.data.manifest
    try:
        manifest = _loaded(uri, seconds, lambda: manifests.load(uri))
    except (OSError, UserError) as error:
        yield failed(check, _named(error, uri), _PACK_AGAIN if is_about_content(error) else advise(error, uri))
        yield skipped(f"{check}: shards", "the manifest cannot be read")
        return
    counts = [f"{name} {sum(len(shard.samples) for shard in shards)}" for name, shards in manifest.splits.items()]
    yield ok(check, f"{uri}: {', '.join(counts)} samples, id {manifest.id[:12]}")
    yield _shards(manifest, seconds)
    for name in manifests.SPLITS:
        yield _split(manifest, name, config, seconds)


def _shards(manifest: Manifest, seconds: float) -> Finding:
    """Whether every shard is there and has its size."""
    check = "data.manifest: shards"
    wanted = {shard.key: shard.bytes for shards in manifest.splits.values() for shard in shards}
    prefix = os.path.commonprefix(list(wanted))  # noqa: RUF071 - of keys, so that nothing else is listed
    try:
        there = with_store(
            manifest.uri, seconds, lambda store: {entry.key: entry.bytes for entry in store.list(prefix)}
        )
    except (OSError, UserError) as error:
        return failed(check, _named(error, manifest.uri), advise(error, manifest.uri))
    wrong = [key for key in wanted if there.get(key) != wanted[key]]
    if wrong:
        kind = "is missing" if wrong[0] not in there else f"has {there[wrong[0]]} bytes instead of {wanted[wrong[0]]}"
        detail = f"{len(wrong)} of {len(wanted)} are not those of the manifest; {manifest.uri}/{wrong[0]} {kind}"
        return failed(check, detail, "copy the missing shards there, or pack again: finished shards are kept")
    return ok(check, f"{len(wanted)}, {sum(wanted.values()) / 1e6:.1f} MB, all there")


def _split(manifest: Manifest, name: str, config: Config, seconds: float) -> Finding:
    """Whether the first sample of a split comes out of its shard as it was packed."""
    from autopainter.data.chunks import Split  # it imports torch, without which the other checks shall still be made

    check = f"data.manifest: {name}"
    try:
        samples = Split(manifest, name, config)
    except UserError as error:
        return failed(
            check, one_line(error), "pack more pictures (--validation is the share held out) or change the field"
        )
    shard, chunk = samples.chunks[0]
    try:
        height, width = within(
            seconds + chunk.stop / _SLOWEST_BYTES_PER_SECOND, lambda: samples.decode(0, samples.fetch(0))
        )[0].shape[:2]
    except (OSError, UserError) as error:
        return failed(
            check, _named(error, manifest.uri), _PACK_AGAIN if is_about_content(error) else advise(error, manifest.uri)
        )
    finally:
        samples.close()
    return ok(check, f"{samples.samples} samples, the first of {shard.key}: {width}x{height}, checksum right")


def check_weights(config: Config, seconds: float) -> Iterator[Finding]:
    """Check the weights of the feature loss."""
    check, uri = "loss.vgg_weights", config.loss.vgg_weights
    if config.loss.feature_weight <= 0 or uri is None:
        yield skipped(check, "loss.feature_weight is 0")
        return
    from autopainter.models import vgg  # as Split

    layer, sha256 = config.loss.feature_layer, config.loss.vgg_sha256
    try:
        _loaded(uri, seconds, lambda: vgg.load(uri, layer, sha256))
    except (OSError, UserError) as error:
        make = f"make it with 'autopainter vgg --layer {layer} --output {uri}'"
        if sha256:
            make += ", or correct loss.vgg_sha256"
        yield failed(check, _named(error, uri), make if is_about_content(error) else advise(error, uri))
        return
    yield ok(check, f"{uri}: VGG16 up to {layer}, sha256 right")


def _loaded(uri: str, seconds: float, load: Callable[[], T]) -> T:
    """Load an object whose place answers; how long that may take depends on its size."""
    if not uri.startswith("https://"):
        folder, name = split(uri)
        size = with_store(folder, seconds, lambda store: store.size(name))
        seconds += (size or 0) / _SLOWEST_BYTES_PER_SECOND
    return within(seconds, load)


def _named(error: BaseException, uri: str) -> str:
    return f"{uri}: {one_line(error)}" if isinstance(error, TimeoutError) else one_line(error)
