"""Train on a Ray cluster:

    python job/train.py --config job/configs/quickstart.yaml
    ray job submit --working-dir . -- python job/train.py --config job/configs/quickstart.yaml

The same command again continues the run.
"""

import sys
from typing import Literal

import click

from autopainter.cli import config_options, exit_code_of, load_to_start, print_plan, setup_logging, start_options


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@config_options
@start_options
def train(
    path: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    resume: Literal["auto", "none"],
    overwrite: bool,
    init_from: str | None,
) -> int:
    """Train on a Ray cluster with cluster.workers workers; the same command again continues the run.

    Uses the cluster of RAY_ADDRESS, else one that runs on this machine, else starts one on this machine. Every field of
    the configuration can be set with --set, or by an environment variable such as AUTOPAINTER__TRAIN__STEPS=100;
    'autopainter fields' lists them.
    """
    config = load_to_start(path, overrides, init_from)
    config.check_world(config.cluster.workers, "cluster.workers")
    if dry_run:
        workers = config.cluster.workers
        print_plan(config, f"trains {config.run.uri} on {workers} Ray worker(s) to step {config.train.steps}")
        return 0
    setup_logging()
    from autopainter import loop
    from autopainter.resume import claim

    claim(config, resume, overwrite)
    loop.preflight(config, config.cluster.workers, "cluster.workers")
    from job import driver

    return driver.run(config)


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: train.main(standalone_mode=False), "job/train.py"))
