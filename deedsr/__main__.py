"""`deedsr` and `python -m deedsr`: a thin door to the command line in `jobs`."""

import sys


def main() -> None:
    """Run the command that was typed and exit with its code."""
    from jobs import cli

    cli.set_up_process()
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
