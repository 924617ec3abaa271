"""The ``impart`` command, one module a subcommand."""


def main() -> None:
    """Entry point of the console script."""
    from compressor.cli.app import main as run

    run()
