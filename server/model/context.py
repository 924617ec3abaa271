"""What the layers know about the current engine step."""

from __future__ import annotations

from server.ops.row_plan import RowPlan


class StepContext:
    """What the layers need to know about the current engine step.

    rows         plan of the hidden rows
    output_rows  plan of the rows whose logits are wanted (the output embedding sees only those)
    merged_slot  slot of every row of this step, if its merged weights are to be used
    """

    def __init__(self) -> None:
        self.rows: RowPlan | None = None
        self.output_rows: RowPlan | None = None
        self.merged_slot: int | None = None
