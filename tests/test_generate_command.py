"""`medley generate`, and the library functions behind it: prompts, output files, HTML report."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from command_inputs import read_rows, write_rows, write_scans
from PIL import Image

from medley import cli
from medley.errors import UserError
from medley.inference.batch import save_response, write_html_report
from medley.inference.prompts import read_prompts
from medley.inference.response import Response

Run = Callable[..., subprocess.CompletedProcess[str]]
COMMAND = ["medley.cli", "generate", "--ckpt", "tiny"]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scans(tmp_path_factory.mktemp("scans"))


def test_interrupted_run_resumes_with_the_same_responses(
    scans: Path, tmp_path: Path, program: Run
) -> None:
    rows = [{"text": f"<image>Is there a cyst? {i}", "image_path": str(scans / f"{i}.png")}
            for i in range(4)]  # fmt: skip
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    words = [*COMMAND, "--input", prompts, "--mode", "text", "--max_new_tokens", "20"]
    words += ["--output", tmp_path / "out"]
    assert "memory: decoder weights" in program(*words).stdout
    file = tmp_path / "out" / "responses.jsonl"
    complete = file.read_text()
    lines = complete.splitlines(keepends=True)
    file.write_text(lines[0] + lines[2] + lines[3][:9])  # as an interrupted run leaves it
    assert "2 prompts are answered already" in program(*words).stdout
    assert file.read_text() == complete
    errors = program(*words, "--seed", 5, status=2).stderr
    assert "results of a run with other options (seed was 0, now 5)" in errors
    assert file.read_text() == complete


def test_run_of_an_older_release_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its options.json has the old name of --raw_prompt."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"text": "Is there a cyst?"}])
    words = ["generate", "--ckpt", "tiny", "--input", str(prompts), "--mode", "text"]
    words += ["--max_new_tokens", "4", "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--complete"]) == 0  # alias
    assert "--complete is deprecated, use --raw_prompt" in capsys.readouterr().err
    options = tmp_path / "out" / "options.json"
    options.write_text(options.read_text().replace('"raw_prompt"', '"complete"'))
    assert cli.main([*words, "--raw_prompt"]) == 0
    assert "1 prompts are answered already" in capsys.readouterr().out


def test_unreadable_prompts_do_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "A \ud800"}, {"text": "Is there a cyst?"},
            {"text": "<image>x", "image_path": "http://127.0.0.1:9/x.png"}]  # fmt: skip
    prompts, output = write_rows(tmp_path / "prompts.jsonl", rows), tmp_path / "out"
    words = ["generate", "--ckpt", "tiny", "--output", str(output)]
    options = ["--input", str(prompts), "--mode", "text", "--max_new_tokens", "4"]
    assert cli.main([*words, *options, "--html_report"]) == 3
    first, second, third = read_rows(output / "responses.jsonl")
    assert "unpaired surrogate" in first["error"]
    assert "parts" in second
    assert "This is a URL. Use --allow_network" in third["error"]
    assert "2 of 3 prompts failed" in capsys.readouterr().err
    assert "Use --allow_network" in (output / "index.html").read_text()
    assert cli.main([*words, "--prompt", "x"]) == 2
    assert "contains the responses to a file of prompts" in capsys.readouterr().err


def test_weights_larger_than_the_free_memory_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medley.commands.model_options.free_memory", lambda device: 1 << 20)
    words = ["generate", "--ckpt", "tiny", "--prompt", "x", "--output", str(tmp_path)]
    assert cli.main([*words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "cpu has 0.0 GB free. Nothing smaller fits. --quantize 4bit needs" in error


def test_folder_of_slices_must_fit_the_context(scans: Path, tmp_path: Path, program: Run) -> None:
    words = [*COMMAND, "--prompt", "Which organ is shown?", "--output", tmp_path, "--mode", "text"]
    output = program(*words, "--image_folder", scans, "--image_limit", 2).stdout
    assert "2 images of 66 tokens; the context has room for 60" in output
    for number in range(61):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:03}.png")
    errors = program(*words, "--image_folder", tmp_path, status=2).stderr
    assert "The folder has 61 images" in errors
    assert "Use --image_limit 60" in errors


def test_url_is_downloaded_only_with_allow_network(tmp_path: Path, program: Run) -> None:
    words = [*COMMAND, "--prompt", "x", "--output", tmp_path]
    words += ["--image", "http://127.0.0.1:9/x.png"]
    assert "This is a URL. Use --allow_network" in program(*words, status=2).stderr
    errors = program(*words, "--allow_network", status=2).stderr
    assert "127.0.0.1:9/x.png" in errors
    assert "This is a URL" not in errors


def test_stop_text_must_be_a_single_token(tmp_path: Path, program: Run) -> None:
    words = [*COMMAND, "--prompt", "x", "--output", tmp_path, "--mode", "text"]
    errors = program(*words, "--stop", "a cyst and more", status=2).stderr
    assert "Expected a single token" in errors


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("", "contains no prompts"),
        ({"text": "a<reserved08706>b"}, "p.jsonl:1: The conversation ends with a response"),
        ({"text": "<image>"}, "p.jsonl:1: "),
    ],
)
def test_invalid_prompt_files_are_rejected(row: object, message: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [row] if row else [])
    with pytest.raises(UserError, match=message):
        read_prompts(path)


def test_html_report_shows_text_images_and_errors(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "navy")
    response = Response(["a <b>", image], "stop", "no image because it does not fit", [])
    rows = [
        save_response(tmp_path, 0, response),
        save_response(tmp_path, 1, "The prompt is empty."),
    ]
    write_html_report(tmp_path / "index.html", rows)
    html = (tmp_path / "index.html").read_text()
    assert "a &lt;b&gt;" in html
    assert 'src="00000_1.png"' in html
    assert (tmp_path / "00000_1.png").is_file()
    assert "does not fit" in html
    assert "The prompt is empty." in html
