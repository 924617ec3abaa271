"""What the layers know about the current engine step."""

from __future__ import annotations

from server.ops.row_plan import RowPlan


class StepContext:
    """What the layers need to know about the current engine step.

    rows         plan of the hidden rows
    output_rows  plan of the rows whose logits are wanted (the output embedding sees only those)
    reconstructed  slots whose reconstructed weights this step uses
    """

    def __init__(self) -> None:
        self.rows: RowPlan | None = None
        self.output_rows: RowPlan | None = None
        self.reconstructed: frozenset[int] = frozenset()
