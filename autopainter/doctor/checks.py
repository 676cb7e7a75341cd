"""All checks, one after the other; whatever is wrong with one of them keeps no other from being made."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from autopainter.config import Config
from autopainter.doctor import cluster, gpus, machine, place, training
from autopainter.doctor.findings import Finding, failed, one_line, without_secrets
from autopainter.errors import UserError

Topic = tuple[str, Callable[..., Iterator[Finding]], tuple[Any, ...]]


def examine(
    config: Config | None, storages: Sequence[str], ray: cluster.Address | None, seconds: float
) -> Iterator[Finding]:
    """Make all checks that can be made.

    Args:
        config: also check what it names: run storage, data set, weights.
        storages: URIs of further places that runs shall be kept in.
        ray: also check this cluster.
        seconds: longest time of a check that waits for something outside this process.
    """
    topics: list[Topic] = [
        ("machine", machine.check, (config,)),
        ("GPUs", gpus.check, (config, ray is not None and not ray.local)),
        *(("storage", place.check, (uri, uri, seconds)) for uri in storages),
    ]
    if config is not None:
        topics += [
            ("run.storage", place.check, ("run.storage", config.run.uri, seconds)),
            ("workers", training.check_workers, (config,)),
            ("data.manifest", training.check_data, (config, seconds)),
            ("loss.vgg_weights", training.check_weights, (config, seconds)),
        ]
    if ray is not None:
        topics.append(("Ray", cluster.check, (ray, config, seconds)))
    for name, check, arguments in topics:
        yield from map(without_secrets, _guarded(name, check, arguments))


def _guarded(name: str, check: Callable[..., Iterator[Finding]], arguments: tuple[Any, ...]) -> Iterator[Finding]:
    """The findings of one topic; what ends it early is one more."""
    try:
        yield from check(*arguments)
    except (OSError, UserError, RuntimeError) as error:
        yield failed(name, one_line(error), "mend what the detail names and run doctor again")
    except Exception as error:
        yield failed(name, f"{type(error).__name__}: {one_line(error)}", "this is a fault of the program: report it")
