"""``impart-serve keys``: the key is printed once and alone, the file holds its hash."""

from __future__ import annotations

import stat

import pytest
from typer.testing import CliRunner

from server.tenants.cli import keys_app
from server.tenants.directory import Directory
from server.tenants.file import parse_tenants, read_tenants


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(keys_app(), ["create", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_create_adds_tenants_and_keys_to_the_file_and_they_work(tmp_path):
    path = tmp_path / "tenants.toml"
    keys = []
    for arguments in (["acme", "--variant", "acme-*"], ["acme", "--id", "second"], ["globex.eu"]):
        code, out, _ = run(*arguments, "--tenants", str(path))
        assert code == 0
        keys.append(out.strip())
    text = path.read_text()
    assert not any(key in text for key in keys)
    directory = Directory(path)
    names = [directory.caller(key).tenant.name for key in keys]
    assert names == ["acme", "acme", "globex.eu"]
    assert directory.caller(keys[1]).key_id == "second"
    assert directory.caller(keys[0]).tenant.variants == ("acme-*",)


def test_create_keeps_comments_and_permissions_of_the_file(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text("# ours\n[tenants.acme]\nweight = 2\n")
    path.chmod(0o640)
    run("acme", "--tenants", str(path))
    assert path.read_text().startswith("# ours\n[tenants.acme]\nweight = 2\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert read_tenants(path).tenants["acme"].weight == 2.0


def test_create_without_a_file_prints_what_belongs_in_one(tmp_path):
    code, key, said = run("acme")
    assert code == 0
    lines = said.partition("\n\n")[2]
    path = tmp_path / "t.toml"
    assert list(parse_tenants(lines, path).tenants) == ["acme"]
    path.write_text(lines)
    assert Directory(path).caller(key.strip()).tenant.name == "acme"


@pytest.mark.parametrize(
    ("before", "name", "arguments", "says"),
    [
        ("[tenants.acme", "t.toml", ["acme"], "it is no TOML"),
        ("tenants: {}", "t.yaml", ["acme"], "can be added to a .toml file only"),
        ("[tenants.acme]\nkeys = []\n", "t.toml", ["acme"], "it is no TOML"),
        ("[tenants.acme]\n", "t.toml", ["acme", "--variant", "x"], "is in"),
        ("[tenants]\n", "t.toml", ["a b"], "tenants.a b: String should match"),
        ("[tenants]\n", "t.toml", ['a"b'], "is no name"),
    ],
)
def test_create_that_cannot_be_changes_nothing(tmp_path, before, name, arguments, says):
    path = tmp_path / name
    path.write_text(before)
    code, out, err = run(*arguments, "--tenants", str(path))
    assert (code, out) == (2, "")
    assert says in err
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_list_shows_ids_or_the_mistake(tmp_path):
    path = tmp_path / "t.toml"
    run("acme", "--id", "one", "--tenants", str(path))
    listed = CliRunner().invoke(keys_app(), ["list", "--tenants", str(path)])
    assert listed.stdout == "acme  one\n"
    path.write_text("x")
    assert CliRunner().invoke(keys_app(), ["list", "--tenants", str(path)]).exit_code == 2
