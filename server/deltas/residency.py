"""What captured graphs depend on: where device arrays are, and which slots they cannot hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.ops.quantize import BaseQuant


@dataclass(slots=True)
class Residency:
    """Shared by all parameters of a base; engine thread only.

    version  rises whenever an array moves or a new one appears: graphs captured before are stale
    vectors  likewise, of the arrays that steps of the base alone read too
    kinds    rises when arrays of another geometry appear: other kernels will read them
    eager    why a slot's rows cannot run in a graph, by slot
    n_slots  slots there are: length of the maps from slots to places (`SlotPlaces.place_of`)
    base_quant  how the base's linears are stored, None: as they are
    """

    version: int = 0
    vectors: int = 0
    kinds: int = 0
    n_slots: int = 64
    base_quant: BaseQuant | None = None
    eager: dict[int, str] = field(default_factory=dict)

    def moved(self, *, vectors: bool = False) -> None:
        """Some array a step reads has another address now."""
        self.version += 1
        self.vectors += vectors

    def created(self) -> None:
        """There are arrays of another geometry."""
        self.kinds += 1
