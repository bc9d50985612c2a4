"""Files in `deploy/`: their commands, options and paths are valid. Neither Docker nor Ray runs."""

from __future__ import annotations

import json
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from fastapi.testclient import TestClient

from medley.commands.serve import ServeOptions
from medley.utils.cli_options import parse

DEPLOY = ROOT / "deploy"


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile, with continued lines joined and without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, arguments) for name, arguments in pairs]


def parse_serve(words: list[str]) -> ServeOptions:
    """Parses a command line of `medley serve`. Raises SystemExit for an invalid one."""
    assert words[0] == "serve"
    return parse(ServeOptions, "medley serve", words[1:])


def test_dockerfile_uses_existing_files_and_valid_options() -> None:
    lines = instructions(DEPLOY / "Dockerfile")
    assert lines[0] == ("FROM", "python:3.11-slim")
    project = (ROOT / "pyproject.toml").read_text()
    for word, rest in lines:
        if word == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources), rest
    (install,) = [rest for word, rest in lines if word == "RUN" and "pip install" in rest]
    extras = re.search(r'"\.\[(.*)\]"', install)
    assert extras is not None
    assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extras[1].split(","))
    assert "-c requirements.txt" in install  # the tested versions
    last = dict(lines)
    assert json.loads(last["ENTRYPOINT"]) == ["medley"]
    assert '\nmedley = "medley.cli:main"\n' in project
    options = parse_serve(json.loads(last["CMD"]))
    assert (options.ckpt, options.host) == (["tiny"], "0.0.0.0")
    assert int(last["EXPOSE"]) == options.port
    assert f":{options.port}/health" in last["HEALTHCHECK"]
    assert last["USER"] != "root"


def test_compose_file_starts_the_same_server() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    (service,) = services.values()
    context = (DEPLOY / service["build"]["context"]).resolve()
    assert context == ROOT.resolve()
    assert (context / service["build"]["dockerfile"]).is_file()
    words = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in service["command"]]
    options = parse_serve(words)
    assert options.ckpt == ["tiny"]
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace > options.drain_seconds  # otherwise running requests are killed
    assert options.token_env in service["environment"]
    first, last = service["ports"][0].split(":")[0].split("-")
    assert int(last) - int(first) + 1 >= service["deploy"]["replicas"]
    assert service["ports"][0].endswith(f":{options.port}")


def test_ray_replicas_build_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a mock of Ray that records its arguments, and calls the builder as a replica does."""
    recorded: dict[str, Any] = {}
    mock_ray = types.ModuleType("ray")

    def deployment(**options: Any) -> Any:
        recorded.update(options)

        def wrap(kind: Any) -> Any:
            kind.bind = classmethod(lambda cls: cls)
            return kind

        return wrap

    def ingress(builder: Any) -> Any:
        recorded["builder"] = builder
        return lambda kind: kind

    mock_ray.serve = types.SimpleNamespace(deployment=deployment, ingress=ingress)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", mock_ray)
    monkeypatch.setenv("MEDLEY_REPLICAS", "3")
    module = runpy.run_path(str(DEPLOY / "ray_serve.py"))
    assert module["application"] is module["Medley"]
    assert recorded["num_replicas"] == 3
    assert recorded["graceful_shutdown_timeout_s"] == ServeOptions(ckpt=["tiny"]).drain_seconds
    with TestClient(recorded["builder"]()) as client:
        assert client.get("/health").json()["status"] == "ok"
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
