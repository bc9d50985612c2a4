"""`medley serve` as a process: flags, probe, shutdown, and the models that it loads."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from running_server import start_server

import medley
from medley import cli
from medley.commands.serve import ServeOptions, load_state
from medley.phantoms import Phantom
from medley.serving.served_models import ServedModel, parse_models
from medley.utils.cli_options import aliases_of, parse

PROMPT = "Show me a CT scan of the head."


@pytest.mark.slow
def test_sigterm_finishes_running_requests_and_rejects_new_ones(tmp_path: Path) -> None:
    origin = "http://localhost:5173"
    process, url = start_server(tmp_path / "log", 0, "--allowed_origins", origin)
    try:
        assert cli.main(["serve", "--probe", url]) == 0
        models = httpx.get(f"{url}/v1/models", headers={"Origin": origin})
        assert models.headers["access-control-allow-origin"] == origin
        body = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}],
                "mode": "image", "min_images": 6, "max_images": 6, "stream": True}  # fmt: skip
        chat = f"{url}/v1/chat/completions"
        with httpx.stream("POST", chat, json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while (health := httpx.get(f"{url}/health")).status_code == 200:
                assert time.monotonic() < deadline
            assert health.json()["status"] == "draining"
            rejected = httpx.post(chat, json=body)
            assert (rejected.status_code, "shutting down" in rejected.text) == (503, True)
            text = "\n".join(lines)
        assert text.count('"images"') == 6
        assert "data: [DONE]" in text
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait(timeout=30)
    assert cli.main(["serve", "--probe", url]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Give exactly one of --ckpt, --controller and --probe"),
        (["--ckpt", "tiny", "--controller"], "Give exactly one of"),
        (["--ckpt", "tiny", "tiny"], "Two models are named 'tiny'"),
        (["--ckpt", "tiny", "--max_num_seqs", "0"], "--max_num_seqs must be at least 1 (got 0)"),
        (["--ckpt", "tiny", "--request_timeout", "0"], "--request_timeout must be positive"),
        (["--ckpt", "tiny", "--port", "0", "--register", "http://x"], "needs --public_url"),
        (["--controller", "--dispatch_method", "random"], "dispatch_method"),
        (["--probe", "ftp://x"], "Not an http or https URL"),
        (["--ckpt", "tiny", "--allowed_origins", "localhost:5173"], "Not an origin (got 'local"),
        (["--ckpt", "tiny", "--allowed_origins", "*", "http://a"], "Give * or origins, not both"),
        (["--controller", "--allowed_origins", "*"], "not for --controller"),
    ],
)
def test_invalid_flags_are_rejected(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["serve", *flags])
    except SystemExit as exit:
        status = int(str(exit.code))
    assert status == 2
    assert message in capsys.readouterr().err


def test_deprecated_flags_set_the_present_options(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ckpt", "tiny", "--rows", "3", "--max_pictures", "4"]  # alias
    flags += ["--page", "--image_hosts", "a", "b", "--max_body", "7", "--max_seconds", "9"]
    options = parse(ServeOptions, "medley serve", flags)
    assert (options.max_num_seqs, options.max_images_per_request, options.ui) == (3, 4, True)
    assert (options.allowed_image_hosts, options.max_body_mb) == (["a", "b"], 7)
    assert options.request_timeout == 9
    warnings = capsys.readouterr().err
    assert "--page is deprecated, use --ui" in warnings
    fields = ServeOptions.__dataclass_fields__
    assert {alias.flag for alias in aliases_of(ServeOptions).values()} <= fields.keys()


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("fastapi", ["--ckpt", "tiny"]), ("uvicorn", ["--controller"]),
        ("prometheus_client", ["--ckpt", "tiny"]), ("gradio", ["--ckpt", "tiny", "--ui"]),
        ("httpx", ["--probe", "http://127.0.0.1:9"]),
    ],
)  # fmt: skip
def test_missing_package_is_reported_before_a_model_is_loaded(
    module: str,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == module else find_spec(name, *a),
    )
    monkeypatch.setattr("medley.commands.serve.load_models", None)
    assert cli.main(["serve", *flags]) == 2
    error = capsys.readouterr().err
    assert f"needs {module}" in error
    assert "[serve]" in error


def test_models_are_named_by_their_path_or_explicitly() -> None:
    assert parse_models(["runs/final", "other=/weights/a=b"], ["x=out/x"]) == [
        ServedModel("final", "runs/final"),
        ServedModel("other", "/weights/a=b"),
        ServedModel("x", "runs/final", Path("out/x")),
    ]


def test_adapters_share_their_base_and_respond_as_if_loaded_alone(tmp_path: Path) -> None:
    scan = Phantom("MR", "head", seed=4).image(64)
    folders = {}
    for name, seed in (("first", 1), ("second", 2)):
        torch.manual_seed(seed)
        model = medley.load("tiny")
        adapted = get_peft_model(
            model.decoder, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        )
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        folders[name] = tmp_path / name
        adapted.save_pretrained(folders[name])
    options = ServeOptions(
        ckpt=["tiny"], adapter=[f"{name}={path}" for name, path in folders.items()]
    )
    served = {name: worker.model for name, worker in load_state(options).workers.items()}
    assert list(served) == ["tiny", "first", "second"]

    def generate(model: medley.Model) -> list[object]:
        prompt = [scan, "Describe the picture."]  # alias
        return model.generate(
            prompt, mode="text", text_greedy=True, repetition_penalty=1.0, max_new_tokens=24
        )

    responses = {name: generate(model) for name, model in served.items()}
    alone = {"tiny": generate(medley.load("tiny"))}
    alone |= {name: generate(medley.load("tiny", adapter=path)) for name, path in folders.items()}
    assert responses == alone
    assert len({str(response) for response in responses.values()}) == 3
    addresses = [
        {p.data_ptr() for n, p in model.decoder.named_parameters() if "lora_" not in n}
        for model in served.values()
    ]
    assert addresses[0] == addresses[1] == addresses[2]
