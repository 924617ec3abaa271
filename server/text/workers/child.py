"""The program of a text worker: `python -P -m server.text.workers.child`, and after that the
descriptor of its socket, its bytes of memory, and the folder of the tokenizer to load first.

torch is kept out, which transformers would load if it were there: of 2.4 s of CPU time and 250 MB
that a worker would take to start, 1 s and 65 MB are left.
"""

from __future__ import annotations

import sys


def main(descriptor: int, memory_bytes: int, first_folder: str) -> None:
    """Serve tasks until the server has gone."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    from server.text.workers.child_loop import serve_tasks

    serve_tasks(descriptor, memory_bytes, first_folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
