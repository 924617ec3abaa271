"""What the layers know about the current engine step."""

from __future__ import annotations

from server.ops.row_mapping import RowMapping


class StepContext:
    """What the layers need to know about the current engine step.

    rows         slots of the hidden rows
    output_rows  slots of the rows whose logits are wanted: the output embedding sees only those, as
                 does whatever else a definition has after its backbone
    reconstructed  slots whose reconstructed weights this step uses
    """

    def __init__(self) -> None:
        self.rows: RowMapping | None = None
        self.output_rows: RowMapping | None = None
        self.reconstructed: frozenset[int] = frozenset()

    def rows_of(self, *, kept: bool) -> RowMapping | None:
        """Of a module that sees the rows whose logits are wanted (`kept`), or of any other."""
        return self.output_rows if kept else self.rows
