"""`deedsr` and `python -m deedsr`: entry point of the command line in `jobs`."""

import sys


def main() -> None:
    """Run the command that was typed and exit with its code."""
    from jobs import cli

    cli.set_up_process()
    code = cli.main()
    # Ray's threads go on printing what workers write, until the process ends: stdout holds the result alone.
    sys.stdout.flush()
    sys.stdout = sys.stderr
    sys.exit(code)


if __name__ == "__main__":
    main()
