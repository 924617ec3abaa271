"""What can go wrong in a comparison."""


class PeersError(RuntimeError):
    """A system did not do what was asked of it, or something it needs is missing."""
