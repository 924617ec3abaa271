"""HTTP layer: fastapi and pydantic, no torch."""
