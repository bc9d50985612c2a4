"""Generation through the public API: `Model`, its options, responses, streams and conversations."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import medley
from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import write_hugging_face
from medley.commands.model_options import ModelOptions
from medley.data.document import ids_to_parts
from medley.errors import UserError
from medley.generation import Engine, GenerationOptions, Request
from medley.generation.config import GenerationKeywords
from medley.generation.sampling import philox_uniforms, sample
from medley.tiny.embedded import tiny_folder

FOLDER = Path(__file__).parent / "golden" / "checkpoints" / "chameleon_7b_layout" / "input"


@pytest.fixture(scope="module")
def model() -> medley.Model:
    return medley.load(FOLDER, device="cpu")


# --- well-formed output for any logits ----------------------------------------------------------


class RandomDecoder:
    """A decoder with random logits."""

    def __init__(self, model: medley.Model, seed: int, scale: float) -> None:
        self.config = model.decoder.config
        self.model = self
        self.embed_tokens = self.lm_head = self
        self.weight = torch.zeros(1)
        self.generator = torch.Generator().manual_seed(seed)
        self.scale = scale

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:  # as lm_head: hidden states (…, D) -> logits
            shape = (*args[0].shape[:-1], self.config.vocab_size)
            return torch.randn(shape, generator=self.generator) * self.scale

        class Output:
            last_hidden_state = torch.zeros(*kwargs["input_ids"].shape, 1)

        return Output


@settings(max_examples=hostile.scaled(40))
@example(seed=0, scale=1.0, mode="any", limit=6, least=2, most=None, count=1, codebook_size=None)
@given(
    seed=st.integers(0, 1000),
    scale=st.floats(0.01, 30),
    mode=st.sampled_from(["any", "text", "image"]),
    limit=st.integers(1, 60),
    least=st.integers(0, 2),
    most=st.one_of(st.none(), st.integers(1, 3)),
    count=st.integers(1, 3),
    codebook_size=st.one_of(st.none(), st.integers(1, 9)),
)
def test_output_is_well_formed_for_any_logits(
    model: medley.Model, seed: int, scale: float, mode: Any, limit: int,
    least: int, most: int | None, count: int, codebook_size: int | None,
) -> None:  # fmt: skip
    try:
        options = GenerationOptions(
            mode=mode, max_new_tokens=limit, min_images=least, max_images=most, seed=seed
        )
    except UserError:
        return
    v = model.vocabulary
    decoder: Any = RandomDecoder(model, seed, scale)
    engine = Engine(decoder, v, codes_per_image=4, codebook_size=codebook_size)
    requests = [Request([v.bos], options, i) for i in range(count)]
    for output in engine.generate(requests, batch_size=2):
        ids = [i for i in output.ids if i not in (v.eos, v.end_turn)]
        assert len(output.ids) <= limit
        assert all(i not in (v.eos, v.end_turn) for i in output.ids[:-1])
        parts = ids_to_parts(ids, model.text_tokenizer)  # raises for an incomplete image
        images = [p for p in parts if not isinstance(p, str)]
        assert all(len(p.codes or ()) == 4 for p in images)
        num_decodable = codebook_size or len(v.image_codes)
        assert all(code < num_decodable for p in images for code in p.codes or ())
        if mode == "text":
            assert not images
        if most is not None:
            assert len(images) <= most
        required = max(least, 1 if mode == "image" else 0)
        if required and limit >= required * 6 + 2:
            assert len(images) >= required
        if len(images) < required:
            assert output.note is not None


# --- randomness and batches ---------------------------------------------------------------------


def test_sequence_does_not_depend_on_its_batch(model: medley.Model) -> None:
    v = model.vocabulary
    prompts = [[v.bos, 8720 + i, v.end_turn] for i in range(4)]
    options = GenerationOptions(min_images=1, max_images=1, max_new_tokens=300, seed=5)
    requests = [Request(p, options, i) for i, p in enumerate(prompts)]
    together = model.engine.generate(requests, batch_size=3)
    alone = [model.engine.generate([r])[0] for r in requests]
    assert [o.ids for o in together] == [o.ids for o in alone]


def test_sequences_with_different_modes_share_a_batch(model: medley.Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text, image = model.generate_batch(
            [["The"], ["The"]], mode=["text", "image"], max_new_tokens=260, image_greedy=True
        )
    assert all(isinstance(part, str) for part in text)
    assert [type(part).__name__ for part in image] == ["Image"]


def test_indices_select_the_random_numbers(model: medley.Model) -> None:
    options = [GenerationOptions(mode="text", max_new_tokens=12, text_temperature=5.0)] * 4
    together = model.generate_responses(["The"] * 4, options)
    alone = [model.generate_responses(["The"], options[:1], indices=[i])[0] for i in range(4)]
    assert [r.ids for r in together] == [r.ids for r in alone]
    assert len({tuple(r.ids) for r in together}) > 1


def test_random_numbers_depend_on_seed_index_and_position() -> None:
    uniforms = philox_uniforms([1, 1, 1, 2], [0, 1, 0, 0], [5, 5, 6, 5])
    assert len(set(uniforms.tolist())) == 4
    assert torch.equal(uniforms, philox_uniforms([1, 1, 1, 2], [0, 1, 0, 0], [5, 5, 6, 5]))
    many = philox_uniforms([3] * 4000, [0] * 4000, range(4000))
    assert abs(float(many.mean()) - 0.5) < 0.02


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0]]).expand(4000, 3)
    tokens = sample(logits, philox_uniforms([3] * 4000, [0] * 4000, range(4000)))
    fraction = float((tokens == 2).double().mean())
    assert abs(fraction - float(torch.tensor([0.0, 1.0]).softmax(0)[1])) < 0.03
    assert not bool((tokens == 1).any())


# --- images -------------------------------------------------------------------------------------


def test_note_explains_that_an_image_does_not_fit(model: medley.Model) -> None:
    options = GenerationOptions(mode="image", max_new_tokens=20)
    (response,) = model.generate_responses([["The"]], [options])
    assert response.parts == []
    assert response.note is not None
    assert "258 tokens" in response.note


def test_note_counts_the_generated_images(model: medley.Model) -> None:
    options = GenerationOptions(mode="image", min_images=2, max_new_tokens=300)
    (response,) = model.generate_responses(["The"], [options])
    assert response.note is not None
    assert response.note.startswith("1 of 2 images because")


def test_image_mode_generates_no_text(model: medley.Model) -> None:
    for seed in range(4):
        options = GenerationOptions(
            mode="image", max_images=3, seed=seed, text_temperature=3.0, max_new_tokens=900
        )
        (response,) = model.generate_responses([["The"]], [options])
        assert response.text == ""
        assert 1 <= len(response.images) <= 3


def test_last_image_is_part_of_a_response_that_stops_after_it(model: medley.Model) -> None:
    options = GenerationOptions(mode="image", max_images=1, max_new_tokens=300)
    (response,) = model.generate_responses(["The"], [options])
    assert response.finish_reason == "stop"
    assert len(response.images) == 1


def test_greedy_image_decoding_warns(model: medley.Model) -> None:
    with pytest.warns(UserWarning, match="blank"):
        model.generate(["The"], image_greedy=True, max_new_tokens=1)


def test_checkpoint_without_vqgan_decoder_generates_no_images(tmp_path: Path) -> None:
    write_hugging_face(tmp_path / "hf", open_checkpoint(FOLDER))
    shutil.move(tmp_path / "hf" / "tokenizer", tmp_path / "vqgan")
    model = medley.load(tmp_path / "hf", device="cpu")
    assert model.generate(["The"], mode="text", text_greedy=True, max_new_tokens=3)
    with pytest.raises(UserError, match="--vqgan"):
        model.generate(["The"], mode="image")
    with_decoder = medley.load(tmp_path / "hf", device="cpu", vqgan=tmp_path / "vqgan")
    assert len(with_decoder.generate(["The"], mode="image", max_new_tokens=258)) == 1
    with pytest.raises(UserError, match="another token space"):
        medley.load(tmp_path / "hf", device="cpu", vqgan=tiny_folder())


# --- prompts, streams, stop tokens --------------------------------------------------------------


def test_string_prompt_is_one_part(model: medley.Model) -> None:
    assert model.encode_prompt("The left") == model.encode_prompt(["The left"])
    assert medley.Turn("user", "The").parts == ("The",)  # type: ignore[arg-type]


def test_prompt_longer_than_the_context_is_rejected(model: medley.Model) -> None:
    limit = model.engine.max_seq_len
    with pytest.raises(UserError, match=f"context is {limit}"):
        model.engine.generate([Request([0] * limit, GenerationOptions())])


def test_streamed_text_equals_generated_text(model: medley.Model) -> None:
    options: dict[str, Any] = {"mode": "text", "text_greedy": True, "max_new_tokens": 20}
    streamed = "".join(event.text or "" for event in model.stream(["The"], **options))
    assert streamed == "".join(map(str, model.generate(["The"], **options)))


def test_stream_contains_previews_of_an_incomplete_image() -> None:
    model = medley.load("tiny", device="cpu")
    events = list(model.stream(["Show me a CT scan."], mode="image", preview_every=16))
    previews = [e.preview for e in events if e.preview is not None]
    assert len(previews) == model.image_tokenizer.codes_per_image // 16
    assert previews[0].size == (model.image_tokenizer.size,) * 2
    images = [e.image for e in events if e.image is not None]
    assert len(images) == 1
    assert images[0].tobytes() == previews[-1].tobytes()  # all image codes are present
    assert events[-1].response is not None
    assert [e.progress for e in events if e.progress][-1] == 1.0


def test_stop_token_is_not_part_of_the_response(model: medley.Model) -> None:
    options: dict[str, Any] = {"text_greedy": True, "repetition_penalty": 1.0}
    ids = model.generate_responses(["The"], [GenerationOptions(mode="text", **options)])[0].ids
    stop = (ids[1],)
    text = model.text_tokenizer.decode(ids[: ids.index(stop[0])])
    with_stop = GenerationOptions(mode="text", stop=stop, **options)
    (response,) = model.generate_responses(["The"], [with_stop])
    assert (response.text, response.finish_reason) == (text, "stop")
    events = list(model.stream("The", mode="text", stop=stop, **options))
    assert "".join(event.text or "" for event in events) == text
    session = model.chat(mode="text", stop=stop, **options)
    list(session.send("The"))
    assert stop[0] not in session.ids[len(model.encode_prompt("The")) :]


def test_stop_tokens_are_not_sampled_before_the_required_images(model: medley.Model) -> None:
    options = GenerationOptions(
        min_images=1, max_images=1, stop=tuple(model.vocabulary.text_tokens), max_new_tokens=300
    )
    assert len(model.generate_responses(["The"], [options])[0].images) == 1


# --- options and deprecated names ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "images"}, "any, text or image"),
        ({"text_temperature": 0}, "text_temperature"),
        ({"image_top_p": 1.5}, "image_top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_images": 3, "max_images": 2}, "max_images"),
        ({"mode": "text", "min_images": 1}, "generates no images"),
    ],
)
def test_invalid_options_name_the_expected_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerationOptions(**options)


def test_keywords_and_flags_are_the_generation_options() -> None:
    fields = {field.name: field for field in dataclasses.fields(GenerationOptions)}
    flags = {field.name: field for field in dataclasses.fields(ModelOptions)}
    assert {"mode", *GenerationKeywords.__annotations__} == set(fields)
    assert {name: flags[name].default for name in fields.keys() - {"stop"}} == {
        name: field.default for name, field in fields.items() if name != "stop"
    }


def test_deprecated_names_warn_and_work(model: medley.Model) -> None:
    document = medley.Document((medley.Turn("user", "The"), medley.Turn("assistant", "left")))
    calls: list[tuple[str, Any, Any]] = [
        ("encode_document", lambda: model.encode(document), model.encode_document(document)),
        ("encode_prompt", lambda: model.prompt_ids("The"), model.encode_prompt("The")),
        ("text_tokenizer", lambda: model.tokenizer, model.text_tokenizer),
        ("raw_prompt=", lambda: model.encode_prompt("The", complete=True),  # alias
         model.encode_prompt("The", raw_prompt=True)),
    ]  # fmt: skip
    for name, call, expected in calls:
        with pytest.warns(DeprecationWarning, match=name):
            assert call() == expected
    options = [GenerationOptions(mode="text", max_new_tokens=2)]
    with pytest.warns(DeprecationWarning, match="generate_responses"):
        (response,) = model.answer_batch(["The"], options)
    with pytest.warns(DeprecationWarning, match="send"):
        events = list(model.chat(mode="text", max_new_tokens=2).say("The"))
    with pytest.warns(DeprecationWarning, match="response"):
        assert events[-1].answer == response
    with pytest.warns(DeprecationWarning, match="auto_map"), pytest.raises(UserError):
        medley.load(FOLDER, device="map", quantize="16bit")  # type: ignore[arg-type]
