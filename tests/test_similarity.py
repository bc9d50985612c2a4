"""Similarity models and the transformers baseline, compared with transformers itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import clip_folder, llava_folder, sentence_folder
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from medley import cli
from medley.data.document import Document, ImagePart, Turn
from medley.errors import UserError
from medley.evaluation.baseline import HFBaseline, write_answers
from medley.evaluation.questions import Question
from medley.evaluation.similarity import ImageSimilarity, SentenceSimilarity

TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
)


def test_sentence_embedding_is_mean_of_last_layer(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path)
    texts = ["there is a cyst", "no", "the head ? . . ."]
    embeddings = SentenceSimilarity(folder, "cpu").embed(texts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    for row, text in zip(embeddings, texts, strict=True):  # one at a time, without padding
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = states.mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-5, rtol=1e-5)
    same = SentenceSimilarity(folder, "cpu").compare(texts, texts)
    assert same == pytest.approx([1.0] * 3, abs=1e-5)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    first = SentenceSimilarity(folder, "cpu").embed(texts)
    assert not torch.allclose(first, embeddings)


def test_image_text_similarity_matches_clip(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path)
    images = [Image.new("RGB", (40, 33), color) for color in ("red", "blue")]
    texts = ["a cyst </s>", "the head </s>"]
    similarity = ImageSimilarity(folder, "cpu")
    values = similarity.compare_with_texts(images, texts)
    model, processor = (
        AutoModel.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    for image, text, value in zip(images, texts, values, strict=True):
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits_per_image
        expected = float(logits / model.logit_scale.detach().exp())
        assert value == pytest.approx(expected, abs=1e-5)
    assert similarity.compare(images, images) == pytest.approx([1.0, 1.0], abs=1e-5)


def test_folders_of_other_models_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Model folder not found"):
        SentenceSimilarity(tmp_path / "nowhere")
    with pytest.raises(UserError, match="Not a sentence-embedding model"):
        SentenceSimilarity(tmp_path)
    with pytest.raises(UserError, match=r"BertModel does not embed images|Not an image-text"):
        ImageSimilarity(sentence_folder(tmp_path / "bert"))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="in open_clip's layout"):
        ImageSimilarity(tmp_path)
    with pytest.raises(UserError, match="Not an image-text model"):
        HFBaseline(tmp_path / "bert")


# --- baseline -------------------------------------------------------------------------------------


def question(number: int, path: Path | None) -> Question:
    parts = ([ImagePart(path=path)] if path else []) + ["is there a cyst ?"]
    return Question(number, "is there a cyst ?", Document((Turn("user", tuple(parts)),)))


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_baseline_answer_matches_transformers(tmp_path: Path, template: str | None) -> None:
    folder = llava_folder(tmp_path / "llava", template)
    path = tmp_path / "a.png"
    image = Image.new("RGB", (40, 33), "red")
    image.save(path)
    answer = HFBaseline(folder, "cpu").answer(question(0, path).prompt)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    text = "<image>\nis there a cyst ?"
    if template:
        text = "USER: <image> is there a cyst ? ASSISTANT:"
    inputs = processor(text=text, images=[image], return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    assert (
        answer
        == processor.decode(
            ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        ).strip()
    )
    assert answer


def test_baseline_answers_are_resumed(tmp_path: Path) -> None:
    folder, output = llava_folder(tmp_path / "llava"), tmp_path / "answers.jsonl"
    Image.new("RGB", (40, 33), "red").save(tmp_path / "a.png")
    questions = [
        question(0, tmp_path / "a.png"),
        question(1, tmp_path / "missing.png"),
        question(2, None),
    ]
    failed = write_answers(folder, questions, output)
    assert len(failed) == 1
    assert "question 1" in failed[0]
    lines = output.read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in lines] == [0, 2]
    output.write_text(lines[0] + "\n" + lines[1][:20])
    write_answers(folder, questions, output)
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["text"] for row in again] == [json.loads(line)["text"] for line in lines]
    for other in ((llava_folder(tmp_path / "other"), questions), (folder, questions[:1])):
        with pytest.raises(UserError, match="results of a run with other options"):
            write_answers(*other, output)


def test_vqa_command_compares_with_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = llava_folder(tmp_path / "llava")
    Image.new("RGB", (40, 33), "red").save(tmp_path / "a.png")
    gold = [
        {"id": i, "image": "a.png", "answer_type": "CLOSED",
         "conversations": [{"from": "human", "value": "is there a cyst ?\n<image>"},
                           {"from": "gpt", "value": "yes"}]}
        for i in range(4)
    ]  # fmt: skip
    (tmp_path / "gold.json").write_text(json.dumps(gold))
    rows = [json.dumps({"question_id": i, "text": "yes"}) + "\n" for i in range(4)]
    (tmp_path / "answers.jsonl").write_text("".join(rows))
    command = ["evaluate", "vqa", "--gt", tmp_path / "gold.json", "--output", tmp_path / "out.json"]
    command += ["--pred", tmp_path / "answers.jsonl", "--image_folder", tmp_path]
    command += ["--baseline", folder]
    assert cli.main([*map(str, command)]) == 0
    result = json.loads((tmp_path / "out.json").read_text())["baseline"]
    assert result["differences"]["closed accuracy"]["b"] == 100
    html = (tmp_path / "out.json.html").read_text(encoding="utf-8")
    assert "Comparison with llava" in html
    (tmp_path / "a.png").unlink()
    (tmp_path / "out.json.baseline.jsonl").unlink()
    assert cli.main([*map(str, command)]) == 2
    assert "All questions failed; the first: question 0" in capsys.readouterr().err
