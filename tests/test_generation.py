from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import medley
from medley.data.document import ids_to_parts
from medley.errors import UserError
from medley.generation import Engine, GenerationOptions, Request
from medley.generation.sampling import philox_uniforms, sample

TINY_FOLDER = Path(__file__).parent / "golden" / "checkpoints" / "chameleon_7b_layout" / "input"


@pytest.fixture(scope="module")
def model() -> medley.Model:
    return medley.load(TINY_FOLDER, device="cpu")


class Noise:
    """A decoder of random logits: whatever they are, what comes out must be well-formed."""

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

        class Out:
            last_hidden_state = torch.zeros(*kwargs["input_ids"].shape, 1)

        return Out


@settings(max_examples=40)
@example(seed=0, scale=1.0, mode="any", limit=6, least=2, most=None, rows=1, codebook=None)
@given(
    seed=st.integers(0, 1000),
    scale=st.floats(0.01, 30),
    mode=st.sampled_from(["any", "text", "image"]),
    limit=st.integers(1, 60),
    least=st.integers(0, 2),
    most=st.one_of(st.none(), st.integers(1, 3)),
    rows=st.integers(1, 3),
    codebook=st.one_of(st.none(), st.integers(1, 9)),
)
def test_whatever_the_logits_the_output_is_well_formed(
    model: medley.Model, seed: int, scale: float, mode: Any, limit: int,
    least: int, most: int | None, rows: int, codebook: int | None,
) -> None:  # fmt: skip
    try:
        options = GenerationOptions(
            mode=mode, max_new_tokens=limit, min_images=least, max_images=most, seed=seed
        )
    except UserError:
        return
    v = model.vocabulary
    engine = Engine(Noise(model, seed, scale), v, codes_per_image=4, codebook=codebook)
    for result in engine.generate(
        [Request([v.bos], options, i) for i in range(rows)], batch_size=2
    ):
        ids = [i for i in result.ids if i not in (v.eos, v.end_turn)]
        assert len(result.ids) <= limit
        assert all(i not in (v.eos, v.end_turn) for i in result.ids[:-1])
        parts = ids_to_parts(ids, model.tokenizer)  # raises for half a picture or a stray code
        images = [p for p in parts if not isinstance(p, str)]
        assert all(len(p.codes or ()) == 4 for p in images)
        drawable = codebook or len(v.image_codes)
        assert all(code < drawable for p in images for code in p.codes or ())
        if mode == "text":
            assert not images
        if most is not None:
            assert len(images) <= most
        wanted = max(least, 1 if mode == "image" else 0)
        if wanted and limit >= wanted * 6 + 2:
            assert len(images) >= wanted
        if len(images) < wanted:
            assert result.note is not None


def test_a_row_does_not_depend_on_its_neighbours(model: medley.Model) -> None:
    v = model.vocabulary
    prompts = [[v.bos, 8720 + i, v.end_turn] for i in range(4)]
    options = GenerationOptions(min_images=1, max_images=1, max_new_tokens=300, seed=5)
    requests = [Request(p, options, i) for i, p in enumerate(prompts)]
    together = model.engine.generate(requests, batch_size=3)
    alone = [model.engine.generate([r])[0] for r in requests]
    assert [r.ids for r in together] == [r.ids for r in alone]


def test_rows_in_different_modes_share_a_batch(model: medley.Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate_batch(
            [["The"], ["The"]], mode=["text", "image"], max_new_tokens=260, image_greedy=True
        )
    assert all(isinstance(part, str) for part in out[0])
    assert [type(part).__name__ for part in out[1]] == ["Image"]


def test_randomness_is_the_seeds_the_rows_and_the_positions() -> None:
    draws = philox_uniforms([1, 1, 1, 2], [0, 1, 0, 0], [5, 5, 6, 5])
    assert len(set(draws.tolist())) == 4
    assert torch.equal(draws, philox_uniforms([1, 1, 1, 2], [0, 1, 0, 0], [5, 5, 6, 5]))
    many = philox_uniforms([3] * 4000, [0] * 4000, range(4000))
    assert abs(float(many.mean()) - 0.5) < 0.02


def test_choosing_follows_the_probabilities() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0]]).expand(4000, 3)
    draws = philox_uniforms([3] * 4000, [0] * 4000, range(4000))
    tokens = sample(logits, draws)
    share = float((tokens == 2).double().mean())
    assert abs(share - float(torch.tensor([0.0, 1.0]).softmax(0)[1])) < 0.03
    assert not bool((tokens == 1).any())


def test_no_room_for_a_picture_is_said(model: medley.Model) -> None:
    answer = model.generate_responses(
        [["The"]], [GenerationOptions(mode="image", max_new_tokens=20)]
    )[0]
    assert answer.parts == []
    assert answer.note is not None
    assert "258 tokens" in answer.note


def test_a_prompt_longer_than_the_context_is_refused(model: medley.Model) -> None:
    context = model.engine.context
    with pytest.raises(UserError, match=f"context is {context}"):
        model.engine.generate([Request([0] * context, GenerationOptions())])


def test_streaming_gives_the_same_text(model: medley.Model) -> None:
    options = {"mode": "text", "text_greedy": True, "max_new_tokens": 20}
    streamed = "".join(e.text or "" for e in model.stream(["The"], **options))
    assert streamed == "".join(map(str, model.generate(["The"], **options)))


def test_pictures_alone_means_no_words(model: medley.Model) -> None:
    for seed in range(4):
        options = GenerationOptions(
            mode="image", max_images=3, seed=seed, text_temperature=3.0, max_new_tokens=900
        )
        answer = model.generate_responses([["The"]], [options])[0]
        assert answer.text == ""
        assert 1 <= len(answer.images) <= 3


def test_a_stop_word_waits_for_the_pictures_and_is_no_part_of_the_answer(
    model: medley.Model,
) -> None:
    options: dict[str, Any] = {"text_greedy": True, "repetition_penalty": 1.0}
    ids = model.generate_responses(["The"], [GenerationOptions(mode="text", **options)])[0].ids
    stop = (ids[1],)
    first = model.tokenizer.decode(ids[: ids.index(stop[0])])
    answer = model.generate_responses(
        ["The"], [GenerationOptions(mode="text", stop=stop, **options)]
    )[0]
    assert (answer.text, answer.finish_reason) == (first, "stop")
    events = list(model.stream("The", mode="text", stop=stop, **options))
    assert "".join(e.text or "" for e in events) == first
    talk = model.chat(mode="text", stop=stop, **options)
    list(talk.send("The"))
    assert stop[0] not in talk.ids[len(model.encode_prompt("The")) :]
    drawn = GenerationOptions(
        min_images=1, max_images=1, stop=tuple(model.vocabulary.text_tokens), max_new_tokens=300
    )
    assert len(model.generate_responses(["The"], [drawn])[0].images) == 1


def test_half_the_pictures_are_counted(model: medley.Model) -> None:
    options = GenerationOptions(mode="image", min_images=2, max_new_tokens=300)
    answer = model.generate_responses(["The"], [options])[0]
    assert answer.note is not None
    assert answer.note.startswith("1 of 2 images because")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "pictures"}, "any, text or image"),
        ({"text_temperature": 0}, "text_temperature"),
        ({"image_top_p": 1.5}, "image_top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_images": 3, "max_images": 2}, "max_images"),
        ({"mode": "text", "min_images": 1}, "draws no pictures"),
    ],
)
def test_bad_options_say_what_is_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerationOptions(**options)


def test_greedy_pictures_are_warned_about(model: medley.Model) -> None:
    with pytest.warns(UserWarning, match="blank"):
        model.generate(["The"], image_greedy=True, max_new_tokens=1)


def test_a_published_hugging_face_folder_reads_but_does_not_draw(tmp_path: Path) -> None:
    import shutil

    from medley.checkpoints.checkpoint import open_checkpoint, tiny_folder, write_hugging_face

    write_hugging_face(tmp_path / "hf", open_checkpoint(TINY_FOLDER))
    shutil.move(tmp_path / "hf" / "tokenizer", tmp_path / "vqgan")
    model = medley.load(tmp_path / "hf", device="cpu")
    assert model.generate(["The"], mode="text", text_greedy=True, max_new_tokens=3)
    with pytest.raises(UserError, match="--vqgan"):
        model.generate(["The"], mode="image")
    drawing = medley.load(tmp_path / "hf", device="cpu", vqgan=tmp_path / "vqgan")
    assert len(drawing.generate(["The"], mode="image", max_new_tokens=258)) == 1
    with pytest.raises(UserError, match="speaks other codes"):
        medley.load(tmp_path / "hf", device="cpu", vqgan=tiny_folder())


def test_rows_keep_their_randomness_in_any_batch(model: medley.Model) -> None:
    options = [GenerationOptions(mode="text", max_new_tokens=12, text_temperature=5.0)] * 4
    whole = model.generate_responses(["The"] * 4, options)
    parts = [model.generate_responses(["The"], options[:1], rows=[row])[0] for row in range(4)]
    assert [a.ids for a in whole] == [a.ids for a in parts]
    assert len({tuple(a.ids) for a in whole}) > 1


def test_a_string_is_one_part(model: medley.Model) -> None:
    assert model.encode_prompt("The left") == model.encode_prompt(["The left"])
    assert medley.Turn("user", "The").parts == ("The",)  # type: ignore[arg-type]
