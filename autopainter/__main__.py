"""Where the program begins: Ctrl-C while the commands are still being imported is one line too."""

import sys


def main() -> None:
    """Console script, and ``python -m autopainter``."""
    try:
        from autopainter import cli
    except KeyboardInterrupt:
        print("\nautopainter: stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
