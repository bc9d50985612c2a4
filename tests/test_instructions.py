"""Instructions from captions: recorded cases, a mock server on loopback, cleaning."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, golden, interruptible_command
from conversion import clean_instructions, generate_instructions
from model_server import Server

from medley.commands.generate_instructions import GenerateInstructionsOptions
from medley.datasets.base import RecordError
from medley.datasets.instructions.captions import (
    PROMPTS,
    Prompts,
    figure_context,
    format_conversation,
    read_captions,
)
from medley.datasets.instructions.cleaning import (
    CleaningRules,
    clean_record,
    clean_turns,
    to_llava_record,
)
from medley.errors import UserError
from medley.utils.cli_options import parse

CASES = golden("llava_med_instruct.json")
RULES = CleaningRules.read(PROMPTS / "cleaning.yaml")
SHIPPED = Prompts.read(PROMPTS / "instructions.yaml")


# --- recorded cases ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["format_conv"], ids=lambda c: c["id"])
def test_replies_are_parsed_into_the_recorded_turns(case: dict[str, Any]) -> None:
    for bit, expected in case["expected"].items():
        last = bit == "random_bit_1_image_last"
        if "error" in expected:
            with pytest.raises(RecordError):
                to_llava_record(case["input"], last)
        else:
            assert to_llava_record(case["input"], last)[0] == expected


@pytest.mark.parametrize("case", CASES["clean_conv"], ids=lambda c: c["id"])
def test_cleaning_returns_the_recorded_turns(
    case: dict[str, Any], exceptions: dict[str, dict[str, str]]
) -> None:
    given = case["input"]["conversations"]
    kept, dropped = clean_turns(given, RULES)
    expected = [turn for record in case["expected"] for turn in record["conversations"]]
    fault = exceptions["llava_med_instruct"].get(case["id"])
    if case["id"] == "strip_prefix":
        assert kept[1]["value"] == "THE lesion is On the LEFT."
    elif fault:
        assert kept == [{"from": "human", "value": "<image>\nQ2"}, *expected[1:]]
    else:
        assert kept == expected
    assert len(kept) + len(dropped) == len(given)


@pytest.mark.parametrize("case", CASES["context_gen"], ids=lambda c: c["id"])
def test_figure_contexts_match_the_recorded_ones(case: dict[str, Any]) -> None:
    record, expected = case["input"], case["expected"]
    assert figure_context(record, True) == expected["with_mentions"]
    assert figure_context(record, False) == expected["without_mentions"]
    roles = [message["role"] for message in SHIPPED.messages("X")]
    pairs = (len(expected["message_roles"]) - 2) // 2  # the reference has more examples
    assert expected["message_roles"] == ["system", *["user", "assistant"] * pairs, "user"]
    assert roles == ["system", *["user", "assistant"] * len(SHIPPED.samples), "user"]
    assert SHIPPED.messages("X")[-1] == expected["last_message"]


def test_mentions_may_be_objects_with_tokens() -> None:
    record = {"fig_label": "F", "fig_caption": "c", "in_text_mention": [{"tokens": "One ."}]}
    assert figure_context(record, True).endswith("\n\nFigure Context:\n\t- One .")


def test_conversations_are_formatted_as_recorded() -> None:
    (case,) = CASES["conv_to_str"]
    assert format_conversation(case["input"]) == case["expected"]


@pytest.mark.parametrize("case", CASES["generate_main"], ids=lambda c: c["id"])
def test_domains_are_interleaved(case: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(case["input"]["domain_dict"]))
    names = [r["pair_id"] for r in read_captions(path, case["input"]["max_size"])]
    recorded = case["expected"]["output_pair_ids"]
    if case["id"] == "max_size_3_yields_2":
        assert names == [*recorded, "c1"]
    elif case["id"] == "failed_batch_is_retried_in_next_round":
        assert sorted(names) == sorted(recorded)
        assert names[:2] == recorded[-2:]
    else:
        assert names == recorded


def test_shipped_examples_pass_the_shipped_cleaning_rules() -> None:
    for _, reply in SHIPPED.samples:
        record, invalid = to_llava_record({"pair_id": "x", "result": reply}, False)
        assert invalid == 0
        kept, dropped = clean_turns(record["conversations"], RULES)
        assert kept == record["conversations"]
        assert not dropped


# --- a mock server -------------------------------------------------------------------------


def write_captions(path: Path, count: int) -> None:
    rows = [
        {"pair_id": f"p{i:02}", "fig_label": "F", "fig_caption": f"c{i:02}"} for i in range(count)
    ]
    path.write_text(json.dumps({"mri": rows}))


def generate(server: Server, folder: Path, *more: Any) -> int:
    words = ["--input", folder / "captions.json", "--output", folder / "raw.jsonl", "--model", "m"]
    words += ["--endpoint", server.address, "--max_retries", 2, *more]
    return generate_instructions.main(list(map(str, words)))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def context(number: int) -> str:
    return f"Figure Caption:\nF: c{number:02}"


def test_failed_requests_are_listed_and_retried(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_captions(tmp_path / "captions.json", 12)
    server.faults = {
        # These succeed after retries ...
        context(1): ["500", "500"], context(2): ["drop"], context(3): ["429"],
        # ... and these fail.
        context(4): ["500"] * 9, context(5): ["empty"], context(6): ["garbage"],
    }  # fmt: skip
    assert generate(server, tmp_path, "--concurrency", 4) == 3
    rows = rows_of(tmp_path / "raw.jsonl")
    assert [row["pair_id"] for row in rows] == [f"p{i:02}" for i in range(12) if i not in (4, 5, 6)]
    assert rows[0]["result"] == "User: Q of 00?\n\nAssistant: A toy."
    failed = {row["pair_id"]: row["error"] for row in rows_of(tmp_path / "raw.jsonl.failed.jsonl")}
    assert set(failed) == {"p04", "p05", "p06"}
    assert "The reply is empty" in failed["p05"]
    assert 2 <= server.max_running <= 4
    assert "3 of 12 records failed" in capsys.readouterr().err

    before = Counter(server.requests)
    server.faults = {}
    assert generate(server, tmp_path) == 0
    assert server.requests - before == Counter({context(4): 1, context(5): 1, context(6): 1})
    assert len(rows_of(tmp_path / "raw.jsonl")) == 12
    assert not (tmp_path / "raw.jsonl.failed.jsonl").exists()
    replies = tmp_path / "raw.jsonl.replies.jsonl"
    replies.write_bytes(replies.read_bytes()[:-9])  # an interrupted write
    before = Counter(server.requests)
    assert generate(server, tmp_path) == 0
    assert sum((server.requests - before).values()) == 1
    assert "none" not in (tmp_path / "raw.jsonl.manifest.json").read_text().split('"key')[0]


def test_invalid_api_key_stops_the_run(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    write_captions(tmp_path / "captions.json", 30)
    server.faults = {context(i): ["401"] for i in range(30)}
    assert generate(server, tmp_path, "--concurrency", 2) == 2
    assert "401" in capsys.readouterr().err
    assert sum(server.requests.values()) < 30
    monkeypatch.delenv("OPENAI_API_KEY")
    assert generate(server, tmp_path) == 2
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err


def test_azure_endpoint_receives_azure_requests(server: Server, tmp_path: Path) -> None:
    write_captions(tmp_path / "captions.json", 1)
    assert generate(server, tmp_path, "--api_version", "2024-06-01", "--limit", 1) == 0
    assert server.paths == ["/v1/openai/deployments/m/chat/completions?api-version=2024-06-01"]


def test_deprecated_tries_flag_counts_attempts(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--input", "i", "--output", "o", "--endpoint", "http://h/v1", "--model", "m"]
    options = parse(GenerateInstructionsOptions, "prog", [*flags, "--tries", "3", "--at_once", "2"])
    assert (options.max_retries, options.concurrency) == (2, 2)
    assert "--tries is deprecated, use --max_retries" in capsys.readouterr().err


def test_each_text_of_a_document_is_translated(server: Server, tmp_path: Path) -> None:
    docs = tmp_path / "docs.jsonl"
    line = {"text": "<image>Why?<reserved08706>So.", "image_path": "a.png", "id": 1}
    docs.write_text(json.dumps(line) + "\n")
    words = ["--input", docs, "--output", tmp_path / "de.jsonl", "--translate", "German"]
    words += ["--endpoint", server.address, "--model", "m"]
    assert generate_instructions.main(list(map(str, words))) == 0
    (row,) = rows_of(tmp_path / "de.jsonl")
    question, answer = row["text"].split("<reserved08706>")
    assert question == "<image>User: Q of y??\n\nAssistant: A toy."
    assert answer == "User: Q of o.?\n\nAssistant: A toy."
    assert row["image_path"] == "a.png"
    assert row["language"] == "German"
    assert all("into German" in body["messages"][0]["content"] for body in server.bodies)


# --- the cleaning command --------------------------------------------------------------------


def test_replies_are_cleaned_into_an_instruction_file(tmp_path: Path) -> None:
    reply = "User: What is it?\n\nAssistant: A toy.\n\nUser: Where?\n\nAssistant: I'm sorry, no."
    rows = [
        {"pair_id": "a", "result": reply, "domain": {"mri": True}},
        {"pair_id": "b", "result": "nothing"},
        {"pair_id": "c", "result": "User: Q\nUser: Q2\nAssistant: A2"},
        {"pair_id": "d", "result": "User: Q\nAssistant: See the caption."},
    ]
    source, output = tmp_path / "raw.jsonl", tmp_path / "instruct.json"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no\n")
    words = ["--input", str(source), "--output", str(output)]
    assert clean_instructions.main([*words, "--image_position", "last"]) == 0
    found = json.loads(output.read_text())
    assert [record["id"] for record in found] == ["a", "c"]
    assert found[0] == {
        "id": "a", "image": "a.jpg", "domain": {"mri": True}, "conversations": [
            {"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A toy."}],
    }  # fmt: skip
    dropped = rows_of(output.with_name("instruct.json.dropped.jsonl"))
    assert len(dropped) == 5
    assert dropped[0]["record"][1]["value"] == "I'm sorry, no."
    assert clean_instructions.main([*words, "--seed", "1"]) == 0  # a clean file does not change
    again = tmp_path / "again.json"
    assert clean_instructions.main(["--input", str(output), "--output", str(again)]) == 0
    assert json.loads(again.read_text()) == json.loads(output.read_text())


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("The patient was unable to see with the left eye.", True),
        ("Malformations having access to the cavernous sinus.", True),
        ("The surgeon cannot view the ureter.", True),
        ("I cannot see the image.", False),
        ("I do not have access to the actual image.", False),
    ],
)
def test_only_refusals_about_the_image_are_dropped(answer: str, kept: bool) -> None:
    assert (RULES.clean(answer) == answer) == kept


def test_yes_or_no_before_a_lead_in_is_kept() -> None:
    answer = "No, based on the information provided, there is no fracture."
    assert RULES.clean(answer) == "No, there is no fracture."


def test_image_token_appears_once_and_empty_turns_are_dropped() -> None:
    reply = (
        "User: What <image>?\nAssistant: A <image> toy.\nUser:\nAssistant: x\nUser: y\nAssistant:"
    )
    record, invalid = to_llava_record({"pair_id": "a", "result": reply}, False)
    assert invalid == 2
    assert format_conversation(record["conversations"]) == (
        "User: <image>\nWhat ?\n\nAssistant: A  toy."
    )
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A toy."}]
    assert clean_turns(turns, RULES)[0][0]["value"] == "<image>\nWhat?"


def test_truncated_or_invalid_replies_fail(server: Server, tmp_path: Path) -> None:
    write_captions(tmp_path / "captions.json", 3)
    server.faults = {context(0): ["length"], context(1): ["surrogate"]}
    assert generate(server, tmp_path) == 3
    failed = [row["error"] for row in rows_of(tmp_path / "raw.jsonl.failed.jsonl")]
    assert "incomplete (finish_reason length)" in failed[0]
    assert "unpaired surrogate" in failed[1]
    server.faults = {}
    assert generate(server, tmp_path) == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "Expected an object"),
        ({"pair_id": "a", "result": 3}, "pair_id and result must be strings"),
        ({"pair_id": "a", "result": "no turn"}, "no question with an answer"),
        ({"conversations": [{"from": "gpt", "value": "A toy."}]}, "do not alternate"),
        ({"pair_id": "a", "result": "User: \ud83d?\nAssistant: A toy."}, "unpaired surrogate"),
    ],
)
def test_invalid_records_raise(source: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        clean_record(source, RULES, "mixed", 0)


def test_identical_requests_are_sent_once(server: Server, tmp_path: Path) -> None:
    docs = tmp_path / "docs.jsonl"
    line = {"text": "Is it?<reserved08706>yes"}
    docs.write_text((json.dumps(line) + "\n") * 8)
    words = ["--input", docs, "--output", tmp_path / "de.jsonl", "--translate", "German"]
    words += ["--endpoint", server.address, "--model", "m"]
    assert generate_instructions.main(list(map(str, words))) == 0
    assert server.requests == {"Is it?": 1, "yes": 1}
    assert len(rows_of(tmp_path / "de.jsonl")) == 8


@pytest.mark.parametrize(
    "address",
    ["http://user:secret@host/v1", "http://host/v1?api-key=secret", "http://[::1", "host/v1"],
)
def test_invalid_endpoints_are_rejected_without_printing_secrets(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--input", "x", "--output", str(tmp_path / "o"), "--model", "m", "--endpoint", address]
    assert generate_instructions.main(words) == 2
    printed = capsys.readouterr()
    assert "secret" not in printed.out + printed.err
    assert "--endpoint" in printed.err


def test_ctrl_c_during_requests_exits_cleanly(server: Server, tmp_path: Path) -> None:
    import os
    import signal
    import subprocess

    write_captions(tmp_path / "captions.json", 2)
    server.faults = {context(0): ["stall"], context(1): ["stall"]}
    words = ["--input", tmp_path / "captions.json", "--output", tmp_path / "raw.jsonl"]
    words += ["--model", "m", "--endpoint", server.address]
    command = interruptible_command("conversion.generate_instructions", *words)
    environment = {**os.environ, "OPENAI_API_KEY": "none"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as running:
        while not server.requests:
            time.sleep(0.05)
        time.sleep(0.3)
        running.send_signal(signal.SIGINT)
        stderr = running.communicate(timeout=30)[1].decode()
    assert running.returncode == 130
    assert "Traceback" not in stderr
    assert stderr.rstrip().endswith("interrupted")


def test_invalid_cleaning_rules_and_prompts_raise(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    for wrong in ("['(']", "sorry"):
        path.write_text(f"refusals: {wrong}\nlead_ins: []\nphrases: []\nforbidden: []\n")
        with pytest.raises(UserError, match="Invalid file of cleaning rules"):
            CleaningRules.read(path)
    path.write_text("samples: []\n")
    with pytest.raises(UserError, match="Expected the keys system and samples"):
        Prompts.read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"mri": [{"pair_id": 3}]}', "mri, record 0: pair_id must be a string"),
        ('[{"pair_id": "a", "fig_label": "F"}]', "record 0: fig_caption must be a string"),
        ("[]", "contains no captions"),
        ('{"a": [1]}', "Expected an object"),
    ],
)
def test_invalid_captions_raise_with_position(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path / "c.json")
