"""What the policies have in common that know no tenants' shares."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.request import Request


class NoShares:
    """Nobody counts, and nobody gives a place or a slot back; see `queue.RequestQueue`."""

    shifts = False

    def charge(self, request: Request, n_input: int, n_output: int) -> None:
        """Nobody counts."""

    def may_overtake(self, request: Request, blocked: Request) -> bool:
        return True

    def gives_way(
        self, request: Request, running: Sequence[Request], *, variant: bool
    ) -> list[Request]:
        return []

    def lets_go(self, request: Request, running: Sequence[Request]) -> list[Request]:
        return []
