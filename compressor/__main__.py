"""``python -m compressor`` is the ``impart`` command."""

from compressor.cli import main

if __name__ == "__main__":
    main()
