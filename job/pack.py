"""Pack on a Ray cluster, a task a shard, with the options of ``autopainter pack``:

    python job/pack.py images s3://bucket/pictures s3://bucket/dataset
    ray job submit --working-dir . -- python job/pack.py images s3://bucket/pictures s3://bucket/dataset

The result is the same to the byte as that of ``autopainter pack``; the same command again continues.
"""

import sys

from autopainter import logs
from autopainter.cli import exit_code_of
from autopainter.cli.data import pack


def main() -> int:
    """Run the command; its exit code."""
    logs.setup()
    from job import cluster

    return exit_code_of(lambda: pack.main(standalone_mode=False, obj=cluster.run_tasks), "job/pack.py")


if __name__ == "__main__":
    sys.exit(main())
