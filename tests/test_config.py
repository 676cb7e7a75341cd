"""The configuration: where values come from, what is refused and how that is said, what identifies a run.

Run: pytest tests/test_config.py
"""

import os
import typing

import pytest
import yaml
from conftest import ROOT

from autopainter.config import Config, fields, flatten, load
from autopainter.config.sections import PRESETS, Loss
from autopainter.errors import UserError

CONFIGS = sorted((ROOT / "job" / "configs").glob("*.yaml"))
LEAST = {
    "run": {"name": "a", "storage": "/tmp/runs"},
    "data": {"manifest": "/tmp/manifest.json"},
    "loss": {"feature_weight": 0},
    "train": {"steps": 3},
}


@pytest.fixture
def file(tmp_path):
    """Write a configuration file: the least that is needed, with sections replaced."""

    def write(text=None, **sections):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(LEAST | sections) if text is None else text, encoding="utf-8")
        return path

    return write


def refusal(path, overrides=(), environment=None):
    """The message that a configuration is refused with: always one line."""
    with pytest.raises(UserError) as caught:
        load(path, overrides, environment or {})
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# Where values come from


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(file):
    variable = {"AUTOPAINTER__TRAIN__GLOBAL_BATCH": "32", "AUTOPAINTER_TRAIN_GLOBAL_BATCH": "5", "HOME": "/root"}
    written = file(train={"steps": 3, "global_batch": 24})
    assert load(file(), environment={}).train.global_batch == 16
    assert load(file(train={"steps": 3, "global_batch": 24}), environment={}).train.global_batch == 24
    assert load(written, environment=variable).train.global_batch == 32
    chosen = load(written, ["train.global_batch=40", "train.global_batch=48"], variable)
    assert chosen.train.global_batch == 48
    assert chosen.train.steps == 3  # the rest of the section stays


def test_the_process_environment_is_read(file, monkeypatch):
    monkeypatch.setenv("AUTOPAINTER__TRAIN__STEPS", "77")
    assert load(file()).train.steps == 77


def test_a_file_is_not_needed():
    texts = [f"{name}={value}" for name, value in flatten(LEAST).items()]
    assert load(None, texts, {}) == Config.model_validate(LEAST)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("train.learning_rate=1e-4", "learning_rate", 1e-4),  # YAML 1.1 takes it for a text
        ("train.microbatch=null", "microbatch", None),
        ("train.microbatch=", "microbatch", None),
        ("train.channels_last=no", "channels_last", False),
        (" train.seed =7", "seed", 7),
    ],
)
def test_texts_become_values_of_the_fields_type(file, text, name, value):
    assert getattr(load(file(), [text], {}).train, name) == value


@pytest.mark.parametrize("name", ["2026-10-01", "0042", "1e3"])
def test_a_text_field_takes_a_text_that_looks_like_something_else(file, name):
    assert load(file(), [f"run.name={name}"], {}).run.name == name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_of_this_project_load_and_round_trip(path, tmp_path):
    loaded = load(path, environment={})
    again = tmp_path / "again.yaml"
    again.write_text(loaded.to_yaml())
    assert load(again, environment={}) == loaded
    assert set(flatten(yaml.safe_load(loaded.to_yaml()))) == set(fields())  # resolved: every field is there


def test_there_are_configs():
    assert {path.stem for path in CONFIGS} >= {"quickstart", "minions", "japanimation"}


def test_every_field_has_a_description():
    for name, field in fields().items():
        assert field.description, name
        assert field.description.endswith("."), name
    assert {"train.steps", "run.storage", "loss.vgg_sha256", "cluster.workers"} <= set(fields())
    assert all(name.count(".") == 1 for name in fields())


def test_a_configuration_does_not_change(file):
    loaded = load(file(), environment={})
    with pytest.raises(ValueError, match="frozen"):
        loaded.train.steps = 5


# What is refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.stepz=4", ["train.stepz", "unknown", "train.steps?"]),
        ("train.global-batch=4", ["train.global-batch", "unknown", "train.global_batch?"]),
        ("steps=4", ["steps", "unknown", "train.steps?"]),
        ("data.imagesize=64", ["data.imagesize", "unknown", "data.image_size?"]),
        ("nonsense.of.mine=1", ["nonsense", "unknown"]),
        ("train.steps=many", ["train.steps", "integer", "'many'"]),
        ("train.steps=1.5", ["train.steps", "integer", "1.5"]),
        ("train.steps=", ["train.steps", "integer", "None"]),
        ("train.steps=0", ["train.steps", "greater than or equal to 1", "0"]),
        ("train.seed=9223372036854775808", ["train.seed", "less than 9223372036854775808"]),
        ("train.learning_rate=.nan", ["train.learning_rate", "nan"]),
        ("data.flip=perhaps", ["data.flip", "boolean", "'perhaps'"]),
        ("data.image_size=100", ["data.image_size", "multiple of 32", "100"]),
        ("loss.adversarial=gann", ["loss.adversarial", "'gan', 'lsgan', 'hinge' or 'wgan-gp'", "'gann'"]),
        ("run.name=Über Name", ["run.name", "pattern", "'Über Name'"]),
        ("run.name=../other", ["run.name", "pattern"]),
        ("loss.vgg_sha256=abc", ["loss.vgg_sha256", "pattern", "'abc'"]),
        ("train=5", ["train", "5"]),
        ("train.steps.more=5", ["train.steps", "section"]),
        ("model.dropout={a: 1}", ["model.dropout", "number"]),
        ("train.steps", ["train.steps", "FIELD=VALUE"]),
        ("train.steps=2024-99-99", ["train.steps", "integer", "'2024-99-99'"]),
        ("train.seed=!!float x", ["train.seed", "integer", "'!!float x'"]),
        ("train=&a {b: *a}", ["train", "dictionary", "'&a {b: *a}'"]),
        ("train={a: {1: 2}}", ["train.a", "unknown"]),
        ("run.storage=s3://", ["run.storage", "'s3://' names no bucket", "s3://BUCKET/KEY"]),  # s3://$UNSET
        ("run.storage=s3:///runs", ["run.storage", "'s3:///runs' names no bucket"]),
        ("run.storage= ", ["run.storage", "must not be empty"]),
        ("run.storage=~/runs", ["run.storage", "'~/runs'", "the whole path"]),
        ("data.manifest=s3://", ["data.manifest", "names no bucket"]),
        ("data.manifest=~/manifest.json", ["data.manifest", "the whole path"]),
        ("data.cache=~/cache", ["data.cache", "the whole path"]),
        ("loss.vgg_weights=s3:///", ["loss.vgg_weights", "names no bucket"]),
        ("train.init_from=s3://@3", ["train.init_from", "names no bucket"]),
    ],
)
def test_a_wrong_field_or_value_is_named(file, text, words):
    message = refusal(file(), [text])
    for word in [*words, "--set"]:
        assert word in message


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("train.stepz", "4", "did you mean train.steps?"), ("data.flip", "perhaps", "boolean"), ("train", "5", "got 5")],
)
def test_the_place_of_a_fault_is_named(file, field, value, words):
    variable = "AUTOPAINTER__" + field.upper().replace(".", "__")
    message = refusal(file(), environment={variable: value})
    assert f"environment variable {variable}: {field}: " in message
    assert words in message

    section, _, name = field.partition(".")
    path = file(**{section: {**LEAST[section], name: yaml.safe_load(value)} if name else yaml.safe_load(value)})
    message = refusal(path)
    assert f"{path}: {field}: " in message
    assert words in message
    assert "--set" in refusal(path, [f"{field}={value}"])  # the later of the two is the one that counts


def test_an_unknown_section_suggests_the_field_that_was_meant(file):
    assert "train.steps" in refusal(file(), ["trian.steps=4"])


def test_a_section_set_as_a_whole_is_the_origin_of_its_fields(file):
    assert "--set" in refusal(file(), ["train={stepz: 3}"])


@pytest.mark.parametrize(
    ("missing", "beside"),
    [("train.steps", "train.seed=1"), ("run.name", "run.storage=x"), ("data.manifest", "data.flip=no")],
)
def test_a_missing_field_is_named_with_what_to_do(file, missing, beside):
    section, name = missing.split(".")
    left = {field: value for field, value in LEAST[section].items() if field != name}
    message = refusal(file(**{section: left}), [beside])
    assert message == f"{missing}: needed and not set; set it in the file or with --set {missing}=..."


@pytest.mark.parametrize("field", ["run.name", "data.manifest", "train.steps"])
def test_a_missing_section_names_the_field_that_it_needs(file, field):
    message = refusal(file(yaml.safe_dump({name: LEAST[name] for name in LEAST if name != field.split(".")[0]})))
    assert "needed and not set" in message
    assert f"--set {field}=" in message


@pytest.mark.parametrize("text", ["train.steps=true", "train.learning_rate=.inf", "loss.pixel_weight=.inf"])
def test_what_is_no_sensible_number_is_refused(file, text):
    assert text.split("=")[0] in refusal(file(), [text])


def test_a_feature_loss_without_weights_is_impossible(file):
    message = refusal(file(loss={"feature_weight": 0.01}))
    assert "loss.vgg_weights" in message
    assert "loss.feature_weight" in message
    assert "autopainter vgg" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected sections"),
        (b"- a\n", "expected sections"),
        (b"train: [", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"!!python/object/apply:os.system ['true']", "not YAML"),
        (b"train: [1]\n", "train"),
        (b"train: 0\n", "train"),
        (b"train:\n  on: 3\n", "train"),  # a truth value in YAML 1.1, as y, n, no and off
        (b"1: 2\n", "1"),
        (b"run: {name: 2026-31-12}", "not YAML: month must be in 1..12; write text that looks like a date"),
        (b"train: {steps: !!float x}", "not YAML: could not convert string to float: 'x'"),
        (b"train: &a {b: *a}", "not YAML: an alias in it stands for itself"),
        (b"train: {a: {1: 2}}", "train.a"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, content, words):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    texts = [f"{name}={value}" for name, value in flatten(LEAST).items() if not name.startswith("train.")]
    message = refusal(path, texts)
    assert str(path) in message
    assert words in message


@pytest.mark.parametrize("name", ["not-there.yaml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    assert str(tmp_path / name) in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("batch", "microbatch", "world", "words"),
    [
        (16, None, 3, ["train.global_batch", "16", "the number of workers 3", "15 or 18"]),
        (4, None, 8, ["train.global_batch", "4", "workers 8", "nearest right values: 8"]),
        (24, 5, 2, ["train.microbatch", "5", "12", "nearest right value: 4"]),
        (8, 16, 2, ["train.microbatch", "16", "nearest right value: 4"]),
    ],
)
def test_a_batch_that_cannot_be_shared_names_the_nearest_that_can(file, batch, microbatch, world, words):
    train = {"steps": 1, "global_batch": batch, "microbatch": microbatch}
    with pytest.raises(UserError) as caught:
        load(file(train=train), environment={}).check_world(world, "the number of workers")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("batch", "microbatch", "world"), [(16, None, 1), (24, 4, 3), (8, 1, 8), (6, 3, 2)])
def test_a_batch_that_can_be_shared_is_taken(file, batch, microbatch, world):
    train = {"steps": 1, "global_batch": batch, "microbatch": microbatch}
    load(file(train=train), environment={}).check_world(world, "the number of workers")


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["train.microbatch=16"], ["train.microbatch: 16", "leave it out"]),
        (["train.activation_checkpointing=outer"], ["train.activation_checkpointing: outer", "set it to none"]),
        (["cluster.workers=2", "cluster.gpus=false"], ["cluster.workers: 2", "GPUs only", "set it to 1"]),
    ],
)
def test_batch_norm_goes_with_nothing_that_would_change_its_statistics(file, texts, words):
    load(file(), texts, {})
    message = refusal(file(), ["model.norm=batch", *texts])
    for word in [*words, "model.norm instance or group"]:
        assert word in message
    load(file(), ["model.norm=batch", "cluster.workers=2"], {})


# What identifies a run

MAY_CHANGE = {
    "run.name", "run.storage",
    "data.manifest", "data.prefetch_batches", "data.fetch_ahead_batches", "data.fetch_threads", "data.decode_threads",
    "data.cache", "data.cache_gib",
    "loss.vgg_weights",
    "train.steps", "train.microbatch", "train.channels_last", "train.compile", "train.activation_checkpointing",
    "train.threads",
}  # fmt: skip


def test_the_identity_is_every_field_that_decides_what_is_computed(file):
    identity = load(file(), environment={}).identity()
    free = {name for name in fields() if name.split(".")[0] in ("checkpoint", "telemetry", "cluster")} | MAY_CHANGE
    assert set(identity) == set(fields()) - free
    assert set(identity) == {name for name, field in fields().items() if field.fixed}


@pytest.mark.parametrize("text", ["train.steps=9", "train.microbatch=2", "cluster.workers=4", "data.manifest=/moved",
                                  "checkpoint.keep=9", "telemetry.images=2", "run.storage=/elsewhere"])  # fmt: skip
def test_what_may_change_leaves_the_identity(file, text):
    assert load(file(), [text], {}) != load(file(), environment={})
    assert load(file(), [text], {}).identity() == load(file(), environment={}).identity()


@pytest.mark.parametrize("text", ["train.seed=1", "train.global_batch=8", "data.lanes=3", "data.image_size=64",
                                  "hints.unhinted=0.5", "model.norm=group", "loss.tv_weight=1.5",
                                  "loss.tv_of=error", "train.precision=float32"])  # fmt: skip
def test_what_decides_the_result_changes_the_identity(file, text):
    name, _, value = text.partition("=")
    changed, before = load(file(), [text], {}).identity(), load(file(), environment={}).identity()
    assert {field for field in before if before[field] != changed[field]} == {name}
    assert str(changed[name]) == value


# Presets


def test_a_preset_gives_the_weights_that_are_not_set(file):
    loss = load(file(), ["loss.preset=authors", "loss.tv_weight=3"], {}).loss
    assert (loss.pixel_weight, loss.tv_weight, loss.feature_layer) == (50, 3, "relu3_2")
    assert loss.feature_weight == 0  # the file says so
    assert load(file(), ["loss.tv_weight=4"], {"AUTOPAINTER__LOSS__PRESET": "paper"}).loss.tv_weight == 4
    assert load(file(), ["loss.preset=paper"], {}).loss.tv_weight == PRESETS["paper"]["tv_weight"]
    assert load(file(), [], {}).loss.preset == "ours"


def test_a_resolved_preset_is_read_again_as_it_was(file, tmp_path):
    resolved = load(file(), ["loss.preset=paper", "loss.pixel_weight=7"], {})
    copy = tmp_path / "resolved.yaml"
    copy.write_text(resolved.to_yaml())
    assert load(copy, environment={}) == resolved


def test_the_table_of_presets_is_that_of_the_docs():
    text = (ROOT / "docs/training.md").read_text()
    defaults = {name: Loss.model_fields[name].default for name in PRESETS["paper"]}
    for field, ours in defaults.items():
        cells = [ours, PRESETS["paper"][field], PRESETS["authors"][field]]
        row = " | ".join(f"{cell:g}" if isinstance(cell, float) else cell for cell in cells)
        assert f"| `loss.{field}` | {row} |" in text


# Secrets


def test_no_field_is_for_a_secret_and_none_comes_in_from_the_environment(file):
    secrets = {name: f"hidden-{name.lower()}" for name in
               ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")}  # fmt: skip
    loaded = load(file(), environment={**os.environ, **secrets})
    assert "hidden-" not in loaded.to_yaml() + repr(loaded) + repr(loaded.identity())
    unfit = ("secret", "password", "token", "credential", "access_key")
    assert not [name for name in fields() if any(word in name for word in unfit)]


def test_a_secret_in_a_field_that_is_not_there_is_not_repeated(file):
    assert "hidden" not in refusal(file(), ["run.aws_secret_access_key=hidden"])


@pytest.mark.parametrize(
    ("field", "uri"),
    [
        ("run.storage", "s3://KEY:hidden@bucket/x"),
        ("data.manifest", "s3://KEY:hidden@bucket/x/manifest.json"),
        ("loss.vgg_weights", "https://me:hidden@example.org/x"),
    ],
)
def test_a_uri_with_credentials_is_refused_and_not_repeated(file, field, uri):
    message = refusal(file(), [f"{field}={uri}"])
    assert field in message
    assert "hidden" not in message


def test_annotations_are_ones_that_a_command_line_can_set():
    """Every field is a plain value or none: a list or a mapping could not be compared or named by its place."""
    for name in fields():
        section, field = name.split(".")
        annotation = Config.model_fields[section].annotation.model_fields[field].annotation
        kinds = typing.get_args(annotation) or (annotation,)
        assert not {list, dict, tuple, set} & {typing.get_origin(kind) or kind for kind in kinds}, name
