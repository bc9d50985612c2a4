"""Models on disk that compare answers, and another model that answers: against transformers."""

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
from medley.evaluation.baseline import Baseline, write_answers
from medley.evaluation.questions import Question
from medley.evaluation.similarity import ImageSimilarity, SentenceSimilarity

TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
)


def test_sentences_are_embedded_by_their_mean(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path)
    texts = ["there is a cyst", "no", "the head ? . . ."]
    found = SentenceSimilarity(folder, "cpu").embed(texts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    for row, text in zip(found, texts, strict=True):  # one by one: nothing is padded
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = states.mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-5, rtol=1e-5)
    same = SentenceSimilarity(folder, "cpu").between(texts, texts)
    assert same == pytest.approx([1.0] * 3, abs=1e-5)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    first = SentenceSimilarity(folder, "cpu").embed(texts)
    assert not torch.allclose(first, found)


def test_pictures_and_words_are_compared_as_clip_does(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path)
    images = [Image.new("RGB", (40, 33), color) for color in ("red", "blue")]
    texts = ["a cyst </s>", "the head </s>"]
    found = ImageSimilarity(folder, "cpu")
    values = found.with_texts(images, texts)
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
    assert found.between(images, images) == pytest.approx([1.0, 1.0], abs=1e-5)


def test_folders_of_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        SentenceSimilarity(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a model of sentences"):
        SentenceSimilarity(tmp_path)
    with pytest.raises(UserError, match=r"BertModel, which embeds no pictures|not a model of pict"):
        ImageSimilarity(sentence_folder(tmp_path / "bert"))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="in open_clip's layout"):
        ImageSimilarity(tmp_path)
    with pytest.raises(UserError, match="no image-text model"):
        Baseline(tmp_path / "bert")


# --- another model's answers --------------------------------------------------------------------


def question(number: int, path: Path | None) -> Question:
    parts = ([ImagePart(path=path)] if path else []) + ["is there a cyst ?"]
    return Question(number, "is there a cyst ?", Document((Turn("user", tuple(parts)),)))


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_baseline_answers_as_transformers_does(tmp_path: Path, template: str | None) -> None:
    folder = llava_folder(tmp_path / "llava", template)
    path = tmp_path / "a.png"
    image = Image.new("RGB", (40, 33), "red")
    image.save(path)
    found = Baseline(folder, "cpu").answer(question(0, path).prompt)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    text = "<image>\nis there a cyst ?"
    if template:
        text = "USER: <image> is there a cyst ? ASSISTANT:"
    inputs = processor(text=text, images=[image], return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    assert (
        found
        == processor.decode(
            ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        ).strip()
    )
    assert found


def test_a_baselines_answers_are_kept_and_gone_on_with(tmp_path: Path) -> None:
    folder, output = llava_folder(tmp_path / "llava"), tmp_path / "answers.jsonl"
    Image.new("RGB", (40, 33), "red").save(tmp_path / "a.png")
    asked = [question(0, tmp_path / "a.png"), question(1, tmp_path / "gone.png"), question(2, None)]
    failed = write_answers(folder, asked, output)
    assert len(failed) == 1
    assert "question 1" in failed[0]
    lines = output.read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in lines] == [0, 2]
    output.write_text(lines[0] + "\n" + lines[1][:20])
    write_answers(folder, asked, output)
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["text"] for row in again] == [json.loads(line)["text"] for line in lines]
    for other in ((llava_folder(tmp_path / "other"), asked), (folder, asked[:1])):
        with pytest.raises(UserError, match="holds answers of other options"):
            write_answers(*other, output)


def test_a_comparison_is_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    words = [
        "evaluate",
        "vqa",
        "--gt",
        tmp_path / "gold.json",
        "--pred",
        tmp_path / "answers.jsonl",
    ]
    words += ["--image_folder", tmp_path, "--baseline", folder, "--output", tmp_path / "out.json"]
    assert cli.main([str(word) for word in words]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["baseline"]
    assert found["differences"]["closed accuracy"]["b"] == 100
    page = (tmp_path / "out.json.html").read_text(encoding="utf-8")
    assert "Beside llava" in page
    (tmp_path / "a.png").unlink()
    (tmp_path / "out.json.baseline.jsonl").unlink()
    assert cli.main([str(word) for word in words]) == 2
    assert "not one question was answered: question 0" in capsys.readouterr().err
