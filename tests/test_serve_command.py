"""`medley serve` as a process: its flags, its check, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model

import medley
from medley import cli
from medley.commands.serve import ServeOptions, load_models
from medley.phantoms import Phantom

ASKED = "Show me a CT scan of the head."


def test_a_server_that_is_stopped_lets_what_runs_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "medley.cli", "serve", "--ckpt", "tiny", "--port", "0"]
    with open(log, "wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 120
        while "listening at" not in (text := log.read_text()):
            assert process.poll() is None and time.monotonic() < until, text
            time.sleep(0.05)
        address = text.split("listening at ")[1].split()[0]
        assert cli.main(["serve", "--check", address]) == 0
        body = {"model": "tiny", "messages": [{"role": "user", "content": ASKED}],
                "mode": "image", "min_images": 6, "max_images": 6, "stream": True}  # fmt: skip
        chat = f"{address}/v1/chat/completions"
        with httpx.stream("POST", chat, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(process.pid, signal.SIGTERM)
            until = time.monotonic() + 10
            while (health := httpx.get(f"{address}/health")).status_code == 200:
                assert time.monotonic() < until
            assert health.json()["status"] == "draining"
            refused = httpx.post(chat, json=body)
            assert (refused.status_code, "shutting down" in refused.text) == (503, True)
            text = "\n".join(lines)
        assert text.count('"images"') == 6
        assert "data: [DONE]" in text
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    assert cli.main(["serve", "--check", address]) == 2


def test_wrong_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ([], "give one of --ckpt, --controller and --check"),
        (["--ckpt", "tiny", "--controller"], "give one of"),
        (["--ckpt", "tiny", "tiny"], "two models are called 'tiny'"),
        (["--ckpt", "tiny", "--rows", "0"], "--rows is 0"),
        (["--check", "ftp://x"], "expected an http or https address"),
    ):
        assert cli.main(["serve", *words]) == 2
        assert said in capsys.readouterr().err


def test_adapters_share_their_base_and_answer_as_if_loaded_alone(tmp_path: Path) -> None:
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
    served = load_models(options)
    assert list(served) == ["tiny", "first", "second"]

    def ask(model: medley.Model) -> list[object]:
        return model.generate([scan, "Describe the picture."], mode="text", text_greedy=True,
                              repetition_penalty=1.0, max_new_tokens=24)  # fmt: skip

    answers = {name: ask(model) for name, model in served.items()}
    alone = {"tiny": ask(medley.load("tiny"))}
    alone |= {name: ask(medley.load("tiny", adapter=path)) for name, path in folders.items()}
    assert answers == alone
    assert len({str(answer) for answer in answers.values()}) == 3
    places = [
        {p.data_ptr() for n, p in model.decoder.named_parameters() if "lora_" not in n}
        for model in served.values()
    ]
    assert places[0] == places[1] == places[2]
