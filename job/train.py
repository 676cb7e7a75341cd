"""Train on a Ray cluster:

    python job/train.py --config job/configs/quickstart.yaml
    ray job submit --working-dir . --runtime-env job/runtime-env.yaml -- \\
        python job/train.py --config job/configs/quickstart.yaml

The same command again continues the run.
"""

import os
import sys
import threading
from typing import NoReturn

import click

from autopainter import logs
from autopainter.cli import Start, exit_code_of, print_plan, start_options
from autopainter.extras import need


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@start_options
def train(start: Start) -> int:
    """Train on a Ray cluster with cluster.workers workers; the same command again continues the run.

    Uses the cluster of RAY_ADDRESS, else one that runs on this machine, else starts one on this machine. Every field of
    the configuration can be set with --set, or by an environment variable such as AUTOPAINTER__TRAIN__STEPS=100;
    'autopainter fields' lists them.
    """
    config = start.config
    config.check_world(config.cluster.workers, "cluster.workers")
    if start.dry_run:
        workers = config.cluster.workers
        print_plan(config, f"trains {config.run.uri} on {workers} Ray worker(s) to step {config.train.steps}")
        return 0
    logs.setup(start.log_format)
    need("job/train.py", "ray", "ray")
    from autopainter import loop

    loop.preflight(config, config.cluster.workers, "cluster.workers", start.resume, start.overwrite)
    from job import driver

    return driver.run(config, start.log_format)


def _leave(code: int) -> NoReturn:
    """End this process."""
    if any(thread.name == "fit" for thread in threading.enumerate()):
        # It waits for workers that never came. Ray, shutting down beside it, could end the process with another code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(exit_code_of(lambda: train.main(standalone_mode=False), "job/train.py"))
