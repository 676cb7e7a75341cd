"""The commands about data sets as a user meets them: what they print, exit codes, and what is stored.

They run by the entry point of the program in this process; test_cli.py runs the program itself.
Run: pytest tests/test_cli_data.py
"""

import io
import json
import tarfile

import cv2
import numpy as np
import pytest
import webdataset
import yaml
from waiting import complaints

from autopainter import storage
from autopainter.data import manifest
from autopainter.data.sketch import xdog


@pytest.fixture
def some(pictures, tmp_path):
    """Forty pictures in two shows, a copy, a broken one and a text."""
    folder = tmp_path / "in"
    for number, path in enumerate(sorted(pictures.iterdir())[:40]):
        (folder / f"show{number % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"show{number % 2}" / path.name).write_bytes(path.read_bytes())
    (folder / "show0" / "copy.png").write_bytes((folder / "show0" / "shape000.png").read_bytes())
    (folder / "show1" / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("")
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def sketched(pictures, folder):
    """Twenty pictures with their drawings: side by side, and in two folders."""
    for path in sorted(pictures.iterdir())[:20]:
        color = cv2.resize(cv2.imread(str(path)), (144, 144), interpolation=cv2.INTER_NEAREST)
        lines = np.dstack([xdog(np.ascontiguousarray(color[..., ::-1]))] * 3)
        for name, image in {"pair": np.hstack([color, lines]), "color": color, "line": lines}.items():
            (folder / name).mkdir(exist_ok=True, parents=True)
            cv2.imwrite(str(folder / name / path.name), image)
    return folder


# pack


def test_bad_inputs_are_printed_and_counted_in_the_exit_code(call, some, out):
    command = ("pack", "images", some, out, "--size", 32, "--validation", 0.2, "--workers", 1)
    done = call(*command)
    assert done.returncode == 1
    assert complaints(done.stderr).splitlines() == [
        "broken: show1/broken.png: not an image of a known format",
        "1 inputs are bad and --max-bad allows 0; the others are in the data set",
    ]
    data = manifest.load(f"{out}/manifest.json")
    counts = {split: sum(len(shard.samples) for shard in shards) for split, shards in data.splits.items()}
    size = sum(path.stat().st_size for path in out.glob("*.tar"))
    line = (
        f"{counts['train']} train, {counts['validation']} validation samples in 2 shards, {size / 1e6:.1f} MB;"
        " 1 broken, 0 undecided, 0 left out by design, 2 share a file; no pictures: 1 .txt"
    )
    assert done.stdout == f"{out}/manifest.json: {line}\n"
    assert sum(counts.values()) == 41

    again = call(*command, "--max-bad", 1)
    assert again.returncode == 0
    assert again.stdout == f"{out}/manifest.json: already packed: {line}\n"
    assert complaints(again.stderr) == "broken: show1/broken.png: not an image of a known format\n"


def test_all_kinds_of_sources(succeed, pictures, out, tmp_path, s3_uri):
    folder = sketched(pictures, tmp_path)
    small = ("--size", 32, "--validation", 0.3, "--workers", 1)
    printed = [
        succeed("pack", "side-by-side", folder / "pair", out / "pair", "--sketch-side", "right", *small),
        succeed("pack", "folders", folder / "color", folder / "line", s3_uri, "--fit", "pad", *small),
        succeed("pack", "images", folder / "color", out / "color", "--sketch", "on-the-fly", *small),
        succeed("pack", "openmoji", out / "emoji", "--limit", 20, *small),
    ]
    made = [manifest.load(line.partition(": ")[0]) for line in printed]
    kinds = [(data.info["source"]["kind"], data.split("train")[0].samples.drawn) for data in made]
    assert kinds == [("side-by-side", True), ("matched-folders", True), ("color-images", False), ("openmoji", True)]
    for data in made[:3]:
        assert sum(len(shard.samples) for shards in data.splits.values() for shard in shards) == 20


def test_undecided_inputs_are_printed(call, pictures, out, tmp_path):
    folder = sketched(pictures, tmp_path) / "pair"
    lines = cv2.imread(str(folder / "shape000.png"))[:, 144:]
    cv2.imwrite(str(folder / "grey.png"), np.hstack([lines, lines]))
    done = call("pack", "side-by-side", folder, out, "--sketch-side", "auto", "--size", 32, "--validation", 0.3,
                "--max-bad", 21, "--workers", 1)  # fmt: skip
    assert done.returncode == 0
    assert "undecided: grey.png: " in done.stderr
    undecided = done.stderr.count("undecided: ")
    assert f"0 broken, {undecided} undecided" in done.stdout
    assert undecided < 10


def test_a_dry_run_groups_as_the_packing_does(call, some, out):
    command = ("pack", "images", some, out, "--size", 32, "--validation", 0.5, "--dry-run")
    done = call(*command)
    assert done.returncode == 0
    assert done.stdout.endswith(f"# packs 42 inputs into 2 shards in {out}\n")
    assert yaml.safe_load(done.stdout)["options"]["group_by"] is None
    done = call(*command, "--group-by", "show9")
    assert (done.returncode, done.stderr) == (
        2, "autopainter: group_by: 'show9' does not match 'show0/copy.png'; it must match every name\n",
    )  # fmt: skip
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["images", "IN", "OUT", "--size", "8"], "size: must be 16 to 4096 pixels, got 8"),
        (["images", "IN", "OUT", "--size", "x"], "'x' is not a valid integer"),
        (["images", "IN", "OUT", "--fit", "cut"], "'cut' is not one of 'crop', 'upper-lower', 'resize', 'pad'"),
        (["images", "IN", "OUT", "--jitter", "2"], "jitter: must be 0 to 1, got 2.0"),
        (["images", "IN", "OUT", "--xdog", "sigma=x"], "xdog.sigma: must be a number, got 'x'"),
        (["images", "IN", "OUT", "--xdog", "sgma=1"], "'sgma' is no parameter; there are sigma, k, gamma"),
        (["images", "IN", "OUT", "--xdog", "k=1"], "xdog.k: must be finite and above 1"),
        (["images", "IN", "OUT", "--validation", "1"], "validation: must be between 0 and 1, got 1.0"),
        (["images", "IN", "OUT", "--group-by", "("], "group_by: '(' is no regular expression"),
        (["images", "IN", "OUT", "--group-by", "part"], "group_by: 'part' does not match"),
        (["images", "IN", "OUT", "--max-bad", "-1"], "-1 is not in the range x>=0"),
        (["images", "IN", "s4://x/y"], "unknown kind of storage"),
        (["images", "IN/none", "OUT"], "no such folder"),
        (["side-by-side", "IN", "OUT"], "Missing option '--sketch-side'"),
        (["folders", "IN", "IN/none", "OUT"], "no such folder"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_bad_options_are_one_line_and_exit_code_2(call, options, said, some, out):
    done = call("pack", *(option.replace("IN", str(some)).replace("OUT", str(out)) for option in options))
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not out.exists()


# index


@pytest.fixture
def shards(pictures, s3_uri):
    """Shards of another maker on S3, with a broken sample."""
    store = storage.open_store(s3_uri)
    for number in range(2):
        buffer = io.BytesIO()
        with webdataset.TarWriter(buffer, encoder=False) as writer:
            for path in sorted(pictures.iterdir())[20 * number : 20 * number + 20]:
                lines = xdog(cv2.imread(str(path)))
                writer.write({
                    "__key__": path.stem,
                    "Art.PNG": path.read_bytes(),
                    "line.jpg": cv2.imencode(".jpg", lines)[1].tobytes(),
                })  # fmt: skip
            writer.write({"__key__": f"lonely{number}", "line.jpg": b""})
        store.write(f"set-{number}.tar", buffer.getvalue())
    return s3_uri


def test_shards_of_others_become_a_data_set(call, shards):
    command = ("index", shards, "--color", ".art.png", "--sketch", "LINE.jpg", "--validation", 0.3, "--workers", 1)
    done = call(*command)
    assert done.returncode == 1
    assert complaints(done.stderr).splitlines() == [
        *(f"broken: {shards}/set-{n}.tar: lonely{n}: has no member .art.png, only line.jpg" for n in range(2)),
        "2 inputs are bad and --max-bad allows 0; the others are in the data set",
    ]
    data = manifest.load(f"{shards}/manifest.json")
    counts = [sum(len(shard.samples) for shard in data.split(name)) for name in ("train", "validation")]
    assert sum(counts) == 40
    samples = f"{counts[0]} train, {counts[1]} validation samples in 2 shards"
    assert done.stdout.startswith(f"{shards}/manifest.json: {samples}, ")
    assert done.stdout.endswith("; 2 broken\n")

    again = call(*command)
    assert again.returncode == 2
    assert again.stderr == (f"autopainter: {shards}/manifest.json: is there; pass --overwrite or another --output\n")
    more = ("--overwrite", "--max-bad", 2, "--validation-shards", "set-1.*")
    assert call(*command, *more).returncode == 0
    data = manifest.load(f"{shards}/manifest.json")
    assert [shard.key for shard in data.split("validation")] == ["set-1.tar"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--color", "png", "--group-by", "("], "group_by: '(' is no regular expression"),
        (["--color", "png", "--group-by", "x"], "group_by: 'x' does not match"),
        (["--color", "webp"], "no sample is left for train; broken: "),
        ([], "Missing option '--color'"),
    ],
)
def test_bad_options_of_index(call, options, said, tmp_path, pictures):
    with tarfile.open(tmp_path / "a.tar", "w") as writer:
        for path in sorted(pictures.iterdir())[:5]:
            writer.add(path, path.name)
    done = call("index", tmp_path, "--workers", 1, *options)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "manifest.json").exists()


# inspect


def test_inspect_describes_and_verifies(succeed, dataset, tmp_path):
    about = yaml.safe_load(succeed("inspect", dataset))
    data = manifest.load(dataset)
    assert (about["id"], about["shards_at"]) == (data.id, data.uri)
    assert "verified" not in about
    folder = dataset.removesuffix("/manifest.json")
    sheet = tmp_path / "new" / "sheet.png"
    verified = json.loads(succeed("inspect", folder, "--json", "--verify", "--sheet", sheet, "--samples", 5))
    assert verified == about | {"verified": True}
    assert cv2.imread(str(sheet)).shape == (140, 6 * 262 + 6, 3)


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_inspect_names_the_damage_with_exit_code_1(call, succeed, place, pictures, out, request):
    uri = str(out) if place == "folder" else request.getfixturevalue("s3_uri")
    succeed("pack", "images", pictures, uri, "--size", 32, "--shard-samples", 32, "--workers", 1)
    store = storage.open_store(uri)
    tar = bytearray(store.read("train-00000.tar"))
    tar[5000] ^= 8
    store.write("train-00000.tar", bytes(tar))
    store.delete(["train-00001.tar"])
    done = call("inspect", uri, "--verify")
    assert done.returncode == 1
    damaged, missing = complaints(done.stderr).splitlines()
    assert damaged.startswith(f"damaged: {uri}/train-00000.tar: chunk of bytes 0 to ")
    assert missing == f"damaged: {uri}/train-00001.tar: not found"
    assert yaml.safe_load(done.stdout)["verified"] is False
    sheet = call("inspect", uri, "--sheet", out / "sheet.png")
    assert sheet.returncode == 1
    assert sheet.stderr == f"autopainter: {uri}/train-00001.tar: not found\n"


def test_inspect_of_nothing_is_one_line(call, tmp_path, dataset):
    for command, said in (
        (("inspect", tmp_path), "manifest.json: not found"),
        (("inspect", tmp_path, "--sheet", tmp_path), "--sheet: "),
        (("inspect", tmp_path, "--sheet", tmp_path / "x.jpg"), "--sheet: "),
        (("inspect", tmp_path, "--sheet", "/proc/none/x.png"), "--sheet: "),
        (("inspect", dataset, "--sheet", "s3://bucket/x.png"), "s3://bucket/x.png: must be a path"),
        (("inspect", dataset, "--sheet", tmp_path / "x.png", "--split", "test"), "no samples in the split 'test'"),
    ):
        done = call(*command)
        assert done.returncode == 2
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
