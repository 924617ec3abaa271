"""The measured rows and the CSV file that holds them."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.peers.errors import PeersError


@dataclass(frozen=True, slots=True)
class Row:
    """One cell measured; the fields are the columns of the CSV file.

    load                 prompt x output tokens of each request
    window_s             requests were started for so long; those that ran then were completed
    output_tokens_per_s  tokens that arrived within `window_s`, over it
    drained_tokens_per_s all tokens over the whole time, the last requests' included
    ttft_*, itl_*        from sending a request to its first token; between pieces of its output
    rss_*                of the server's process tree; ready: nothing asked yet; half: the base and
                         the first half of the variants were asked; warm: all of them were; peak:
                         while the cell was measured
    variant_disk_bytes   mean of the variants' directories
    """

    system: str = ""
    variants: int = 0
    load: str = ""
    mix: str = ""
    concurrency: int = 0
    requests: int = 0
    window_s: float = math.nan
    wall_s: float = math.nan
    output_tokens_per_s: float = math.nan
    drained_tokens_per_s: float = math.nan
    ttft_p50_ms: float = math.nan
    ttft_p99_ms: float = math.nan
    itl_p50_ms: float = math.nan
    itl_p99_ms: float = math.nan
    rss_ready_bytes: int = 0
    rss_half_bytes: int = 0
    rss_warm_bytes: int = 0
    rss_peak_bytes: int = 0
    variant_disk_bytes: int = 0
    ready_s: float = math.nan
    client_cpu_s: float = math.nan
    versions: str = ""
    cpus: int = 0
    commit: str = ""
    time: str = ""

    @property
    def key(self) -> tuple[str, int, str, str]:
        """What was measured; as `Cell.key`."""
        return self.system, self.variants, self.load, self.mix


def read_rows(path: Path) -> list[Row]:
    """Read what `append_row` wrote; nothing if there is no such file. Raises PeersError."""
    if not path.exists():
        return []
    types: dict[str, Callable[[str], object]] = {"str": str, "int": int, "float": float}
    wanted = {field.name: types[str(field.type)] for field in fields(Row)}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or []) != list(wanted):
            raise PeersError(
                f"{path} has other columns, an older version wrote it; move it away or give "
                "another --out"
            )
        try:
            return [Row(**{name: wanted[name](row[name]) for name in wanted}) for row in reader]
        except (ValueError, TypeError) as error:
            raise PeersError(f"{path} does not parse ({error}); remove its broken line") from error


def append_row(path: Path, row: Row) -> None:
    """Add a row to the file, which is made if need be; on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if is_new:
            writer.writeheader()
        writer.writerow({name: _cell(value) for name, value in asdict(row).items()})


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
