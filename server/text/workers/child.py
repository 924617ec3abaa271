"""The program of a text worker: `python -P -m server.text.workers.child DESCRIPTOR MEMORY_BYTES`.

torch is kept out, which transformers would load if it were there: of 2.4 s of CPU time and 250 MB
that a worker would take to start, 1 s and 65 MB are left.
"""

from __future__ import annotations

import sys


def main(descriptor: int, memory_bytes: int) -> None:
    """Serve tasks until the server has gone."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    from server.text.workers.child_loop import serve_tasks

    serve_tasks(descriptor, memory_bytes)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
