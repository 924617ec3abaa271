"""The demo's base model, as far as it needs no wheel."""

from __future__ import annotations

from pathlib import Path

from deploy.demo.get_base import let_others_read


def test_let_others_read_gives_every_file_to_all(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).touch(mode=0o600)
    let_others_read(tmp_path)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o644}
