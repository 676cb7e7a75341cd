"""Pack on a Ray cluster, a task a shard, with the options of ``autopainter pack``:

    python job/pack.py images s3://bucket/pictures s3://bucket/dataset
    ray job submit --working-dir . -- python job/pack.py images s3://bucket/pictures s3://bucket/dataset

The result is the same to the byte as that of ``autopainter pack``; the same command again continues.
"""

import sys

from autopainter import logs
from autopainter.cli import exit_code_of
from autopainter.cli.data import pack
from autopainter.extras import need


def main() -> int:
    """Run the command; its exit code."""
    logs.setup()
    return exit_code_of(_pack, "job/pack.py")


def _pack() -> None:
    need("job/pack.py", "ray", "ray")
    from job import cluster

    pack.main(standalone_mode=False, obj=cluster.run_tasks)


if __name__ == "__main__":
    sys.exit(main())
