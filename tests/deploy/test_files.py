"""The deployment files agree with each other and with the code; no Docker is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from server.settings import Settings

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


def test_compose_both_services_have_a_health_check(compose: Any) -> None:
    assert set(compose["services"]) == {"server", "prometheus"}
    for service in compose["services"].values():
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
        assert {"interval", "timeout", "retries"} <= service["healthcheck"].keys()


def test_compose_publishes_on_the_loopback_interface_only(compose: Any) -> None:
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_compose_files_it_mounts_exist(compose: Any) -> None:
    mounts = [v for service in compose["services"].values() for v in service["volumes"]]
    local = [mount.split(":")[0] for mount in mounts if mount.startswith("./")]
    assert local
    for source in local:
        assert (DEPLOY / source).exists(), source
    named = {m.split(":")[0] for m in mounts if not m.startswith((".", "$"))}
    assert named == set(compose["volumes"])


def test_compose_build_context_has_the_dockerfile_and_its_arguments(
    compose: Any, dockerfile: str
) -> None:
    build = compose["services"]["server"]["build"]
    assert (DEPLOY / build["context"] / "Dockerfile").samefile(ROOT / "Dockerfile")
    declared = set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))
    assert set(build["args"]) <= declared


def test_prometheus_scrapes_the_service_of_compose(compose: Any) -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    targets = [
        target
        for job in config["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    ]
    for target in targets:
        host, _, port = target.partition(":")
        service = compose["services"][host]
        assert port in service["expose"]
        assert port == service["environment"]["IMPART_ADMIN_PORT"]
    (job,) = config["scrape_configs"]
    secret = Path(job["authorization"]["credentials_file"]).name
    assert secret in compose["services"]["prometheus"]["secrets"]
    assert compose["secrets"][secret] == {"environment": "IMPART_ADMIN_KEY"}


def test_dockerfile_runs_unprivileged_offline_and_checked(dockerfile: str) -> None:
    final = dockerfile[dockerfile.rindex("\nFROM ") :]
    assert re.search(r"^USER (?!root|0\b)", final, re.MULTILINE)
    assert "HF_HUB_OFFLINE=1" in final
    assert re.search(r"^HEALTHCHECK .*/health", final, re.MULTILINE)
    assert 'ENTRYPOINT ["impart-serve"]' in final
    assert final.index("\nUSER ") < final.index("\nENTRYPOINT ")


def test_dockerfile_health_check_is_valid_python(dockerfile: str) -> None:
    (line,) = re.findall(r"HEALTHCHECK .*? CMD (\[.*\])", dockerfile)
    program = ast.literal_eval(line)
    assert program[:2] == ["python", "-c"]
    ast.parse(program[2])


def test_environment_names_are_settings(compose: Any, dockerfile: str) -> None:
    known = {f"IMPART_{field.name.upper()}" for field in fields(Settings)}
    used = set(re.findall(r"\b(IMPART_\w+)=", dockerfile))
    used |= set(compose["services"]["server"]["environment"])
    assert used
    assert used <= known


def test_dockerfile_copies_only_what_the_ignore_file_lets_in(dockerfile: str) -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied: set[str] = set()
    for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.MULTILINE):
        copied |= set(line.split()[:-1])
    assert copied == allowed
    for name in copied:
        assert (ROOT / name).exists(), name


def test_constraints_pin_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = {_normal(pin.name): str(pin.specifier).removeprefix("==") for pin in pinned}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    for requirement in map(Requirement, wanted):
        assert _normal(requirement.name) in pins, f"constraints.txt lacks {requirement.name}"
        assert requirement.specifier.contains(pins[_normal(requirement.name)]), requirement


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("target", ["demo", "test", "check", "bench", "clean"])
def test_make_knows_the_target(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_torch_is_the_same_version_everywhere(dockerfile: str) -> None:
    versions = {
        re.search(r"torch==([\d.]+)", text).group(1)  # type: ignore[union-attr]
        for text in (dockerfile, *((ROOT / f).read_text() for f in ("Makefile", "constraints.txt")))
    }
    assert len(versions) == 1
