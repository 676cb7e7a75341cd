"""The commands of the storage pod and the TensorBoard pod, run for real with the manifests' flags on free ports."""

import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import boto3
import botocore
import botocore.config
import botocore.exceptions
import manifests
import pytest
from services import SeaweedFS, TensorBoard


def flags(kind: str, name: str) -> list[str]:
    """The command of the only container of a manifest."""
    (container,) = manifests.one(kind, name)["spec"]["template"]["spec"]["containers"]
    command: list[str] = container["command"]
    return command


class StorageOfTheManifest(SeaweedFS):
    """SeaweedFS with the manifest's flags, but for its folder, addresses and ports."""

    def _launch(self) -> tuple[list[str], Mapping[str, str], Path]:
        (weed, *ours), environment, log = super()._launch()
        places = [flag for flag in ours if flag.startswith(("-dir=", "-ip")) or ".port=" in flag]
        given = flags("StatefulSet", "autopainter-storage")
        assert given[:3] == ["weed", "-logtostderr", "mini"]
        moved = {flag.partition("=")[0] for flag in places}
        others = [flag for flag in given[3:] if flag.partition("=")[0] not in moved]
        return [weed, *given[1:3], *places, *others], environment, log


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[SeaweedFS]:
    """A running one, which is ready when both buckets take and give objects."""
    with StorageOfTheManifest(tmp_path / "data", ("datasets", "autopainter")) as server:
        yield server


def test_storage_of_the_manifest_has_the_buckets_and_asks_for_the_key(storage: SeaweedFS) -> None:
    assert {bucket["Name"] for bucket in storage.client().list_buckets()["Buckets"]} == {"datasets", "autopainter"}
    unsigned = botocore.config.Config(signature_version=botocore.UNSIGNED, proxies={})
    stranger = boto3.client("s3", endpoint_url=storage.endpoint, region_name="us-east-1", config=unsigned)
    with pytest.raises(botocore.exceptions.ClientError, match="AccessDenied"):
        stranger.put_object(Bucket="autopainter", Key="x", Body=b"x")
    with pytest.raises(botocore.exceptions.ClientError, match="NoSuchBucket"):
        storage.client().put_object(Bucket="autopaimter", Key="x", Body=b"x")  # a typo makes no bucket


class BoardOfTheManifest(TensorBoard):
    """TensorBoard with the manifest's flags, but for its port."""

    def _launch(self) -> tuple[list[str], Mapping[str, str], Path]:
        command, environment, log = super()._launch()
        options = flags("Deployment", "autopainter-tensorboard")[1:]
        options[options.index("--port") + 1] = self._options[self._options.index("--port") + 1]
        return [*command[: -len(self._options)], *options], environment, log


def test_tensorboard_of_the_manifest_reads_the_bucket(s3: SeaweedFS) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with BoardOfTheManifest("", s3.env) as board, direct.open(f"{board.url}/data/environment", timeout=30) as answer:
        assert '"data_location": "s3://autopainter/runs"' in answer.read().decode()
