"""Parity with the reference implementations: transformers' Chameleon and PEFT."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import medley
from medley.checkpoints.adapter import merged_tensors
from medley.checkpoints.chameleon import ChameleonWeights
from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import write_chameleon, write_hugging_face
from medley.data.packing import build_sequence, collate
from medley.errors import UserError
from medley.generation import GenerationOptions, Request
from medley.generation.sampling import penalize_repetition, top_k_top_p
from medley.phantoms import Phantom
from medley.trainer.parameters import trainable_model


def test_tensors_and_logits_equal_recorded_cases(layout: Path) -> None:
    checkpoint = open_checkpoint(layout / "input")
    expected, found = (
        load_file(layout / "hf_language_model.safetensors"),
        dict(checkpoint.tensors()),
    )
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    recorded = load_file(layout / "expected.safetensors")
    with torch.inference_mode():
        logits = checkpoint.decoder(torch.float32)(recorded["input_ids"]).logits[..., ::8]
    assert torch.allclose(logits, recorded["logits_fp32_unmasked"], atol=1e-5)


def test_converting_to_hugging_face_and_back_is_the_identity(layout: Path, tmp_path: Path) -> None:
    source = open_checkpoint(layout / "input")
    write_hugging_face(tmp_path / "hf", source)
    write_chameleon(tmp_path / "back", open_checkpoint(tmp_path / "hf"), "any", source)
    back = open_checkpoint(tmp_path / "back")
    first, second = (ChameleonWeights(c.model_folder)._shards for c in (source, back))
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert all(one[name].dtype == other[name].dtype for name in one)
    assert (
        back.fingerprint() == source.fingerprint() == open_checkpoint(tmp_path / "hf").fingerprint()
    )


def test_stock_transformers_loads_the_hugging_face_layout(layout: Path, tmp_path: Path) -> None:
    source = open_checkpoint(layout / "input")
    write_hugging_face(tmp_path / "hf", source)
    stock, info = transformers.ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    ids = load_file(layout / "expected.safetensors")["input_ids"]
    with torch.inference_mode():
        theirs = stock(ids).logits
        ours = source.decoder(torch.float32)(ids).logits
    codes = source.text_tokenizer().vocabulary.image_codes
    text = [i for i in range(ours.shape[-1]) if i not in codes]
    assert torch.equal(theirs[..., text], ours[..., text])
    assert float(theirs[..., list(codes)].max()) == torch.finfo(torch.float32).min


def test_norms_that_differ_between_heads_are_refused(layout: Path, tmp_path: Path) -> None:
    source = open_checkpoint(layout / "input")

    def with_unequal_norms() -> Any:
        for name, tensor in source.tensors():
            if name.endswith("layers.1.self_attn.q_norm.weight"):
                tensor = tensor.clone()
                tensor[0, 0] += 1
            yield name, tensor

    write_hugging_face(tmp_path / "hf", source, with_unequal_norms())
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_norm\.weight.*differ"):
        write_chameleon(tmp_path / "pth", open_checkpoint(tmp_path / "hf"), "any", source)
    assert not (tmp_path / "pth").exists()


def test_processor_gives_the_ids_of_encode_prompt(tmp_path: Path) -> None:
    model = medley.load("tiny")
    write_hugging_face(tmp_path / "hf", open_checkpoint("tiny"))
    processor = transformers.ChameleonProcessor.from_pretrained(tmp_path / "hf")
    image = Phantom("CT", "head").image(64)
    batch = processor(text="<image>What is this?", images=[image], return_tensors="pt")
    ours = model.encode_prompt([image, "What is this?"])
    codes, placeholder = model.vocabulary.image_codes, model.vocabulary.image_placeholder
    assert batch["input_ids"][0].tolist() == [placeholder if i in codes else i for i in ours]
    assert torch.allclose(batch["pixel_values"][0], model.image_tokenizer.pixels(image), atol=1e-6)


def test_chat_template_gives_the_ids_of_encode_document(tmp_path: Path) -> None:
    model = medley.load("tiny")
    write_hugging_face(tmp_path / "hf", open_checkpoint("tiny"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is there a cyst?"},
        {"role": "assistant", "content": "no"},
    ]
    document = medley.Document.from_json({"messages": messages})
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == model.encode_document(document)
    with pytest.raises(Exception, match="role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


# --- adapters -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"r": 2, "lora_alpha": 2, "modules_to_save": ["lm_head"]},
        {"r": 2, "lora_alpha": 2, "trainable_token_indices": {"lm_head": [5, 17, 8000]}},
    ],
    ids=["plain", "rslora", "patterns", "saved", "rows"],
)
def test_merged_adapter_equals_pefts_merge(options: dict[str, Any], tmp_path: Path) -> None:
    base = open_checkpoint(
        Path(__file__).parent / "golden" / "checkpoints" / "chameleon_7b_layout" / "input"
    )
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(base.decoder(torch.float32), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape) * 0.1)
                assert "vqmodel" not in name
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    found = dict(merged_tensors(base, tmp_path / "adapter"))
    for name, tensor in found.items():
        rounded = expected[name].to(tensor.dtype).float()
        assert torch.allclose(tensor.float(), rounded, rtol=2**-7, atol=1e-6), name
    # Older versions of PEFT wrote the same tensors as a pickle.
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    for name, tensor in merged_tensors(base, tmp_path / "adapter"):
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("trainable", ["lora", "image_head", "lora+image_head", "full"])
def test_each_mode_trains_its_parameters_only(
    trainable: str, sequences: list[Any], tokenizer: Any
) -> None:
    folder = Path(__file__).parent / "golden" / "checkpoints" / "chameleon_7b_layout" / "input"
    decoder = open_checkpoint(folder).decoder(torch.float32)
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    model = trainable_model(
        decoder, trainable, tokenizer.vocabulary, "base",
        rank=2, alpha=4, dropout=0.0, targets=["q_proj", "up_proj"],
    )  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    batch = collate([build_sequence(sequences, tokenizer.vocabulary)], tokenizer.vocabulary)
    for _ in range(2):  # in the first step, lora_A has no gradient
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    merged = model if trainable == "full" else model.merge_and_unload()
    changed = {n for n, t in merged.state_dict().items() if not torch.equal(t, before[n])}
    assert not any("vqmodel" in name for name in changed)
    adapted = {n for n in before if n.endswith(("q_proj.weight", "up_proj.weight"))}
    expected = {
        "lora": adapted,
        "image_head": {"lm_head.weight"},
        "lora+image_head": adapted | {"lm_head.weight"},
        "full": {n for n in before if "vqmodel" not in n},
    }[trainable]
    assert changed == expected
    if trainable == "image_head":
        difference = (merged.state_dict()["lm_head.weight"] - before["lm_head.weight"]).abs().sum(1)
        assert set(difference.nonzero().flatten().tolist()) <= set(tokenizer.vocabulary.image_codes)


# --- generation ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> medley.Model:
    folder = Path(__file__).parent / "golden" / "checkpoints" / "chameleon_7b_layout" / "input"
    return medley.load(folder, device="cpu")


def make_prompts(model: medley.Model) -> list[list[int]]:
    """Three prompts of different lengths; the second contains an image."""
    rng, v = random.Random(0), model.vocabulary
    text = sorted(i for i in v.text_tokens if i < 8800)
    prompts = [[v.bos, *rng.choices(text, k=n), v.end_turn] for n in (3, 9, 17)]
    image = v.image_token_ids(rng.choices(range(8192), k=model.image_tokenizer.codes_per_image))
    prompts[1][4:4] = image
    return prompts


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_greedy_text_equals_transformers_generate(model: medley.Model, penalty: float) -> None:
    v, size = model.vocabulary, model.decoder.config.vocab_size
    prompts = [p for p in make_prompts(model) if v.begin_image not in p]
    options = GenerationOptions(
        mode="text", text_greedy=True, repetition_penalty=penalty, max_new_tokens=24
    )
    results = model.engine.generate([Request(p, options, i) for i, p in enumerate(prompts)])
    ends = [v.eos, v.end_turn]
    allowed = {*v.text_tokens, *ends}
    for prompt, result in zip(prompts, results, strict=True):
        # Medley's penalty applies to text tokens only, not to special tokens.
        expected = model.decoder.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            logits_processor=transformers.LogitsProcessorList([TextPenalty(penalty, v)]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=v.pad,
            suppress_tokens=[i for i in range(size) if i not in allowed],
        )[0, len(prompt) :].tolist()
        assert result.ids == expected


class TextPenalty(transformers.RepetitionPenaltyLogitsProcessor):  # type: ignore[misc]
    """transformers' penalty for the text tokens of the context only."""

    def __init__(self, penalty: float, vocabulary: Any) -> None:
        super().__init__(penalty)
        self.text_tokens = vocabulary.text_tokens

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        text = [[i for i in ids if i in self.text_tokens] for ids in input_ids.tolist()]
        return super().__call__(torch.tensor(text), scores)


def test_penalty_top_k_and_top_p_equal_transformers() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 50), torch.randint(0, 50, (3, 7))
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, ids, True)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    assert torch.equal(penalize_repetition(logits, seen, torch.full((3, 1), 1.3)), theirs)
    for top_k, top_p in ((0, 0.7), (5, 1.0), (9, 0.6), (0, 1.0)):
        theirs = logits.clone()
        if top_k:
            theirs = transformers.TopKLogitsWarper(top_k)(ids, theirs)
        theirs = transformers.TopPLogitsWarper(top_p)(ids, theirs)
        for width in (30, 50):
            ids_found, found, complete = top_k_top_p(logits, top_k, top_p, width)
            ours = torch.zeros(3, 50).scatter_(1, ids_found, found)
            ours = ours / ours.sum(-1, keepdim=True)
            same = torch.isclose(ours, theirs.softmax(-1), atol=1e-6).all(-1)
            assert bool(same[complete].all())
            assert bool(complete.all()) or width < 50


def test_guided_image_tokens_equal_three_forward_passes(model: medley.Model) -> None:
    options = GenerationOptions(mode="image", image_greedy=True)
    prompts = make_prompts(model)
    results = model.engine.generate([Request(p, options, i) for i, p in enumerate(prompts)])
    v, count = model.vocabulary, model.image_tokenizer.codes_per_image
    for prompt, result in zip(prompts, results, strict=True):
        assert len(result.ids) == count + 2
        assert result.ids[0] == v.begin_image
        assert result.ids[-1] == v.end_image
        images = [
            token
            for token in prompt
            if token in v.image_codes or token in (v.begin_image, v.end_image)
        ]
        for position in (1, 2, 7, 40):
            own = result.ids[:position]
            cond, image_cond, uncond = (
                _last_logits(model, [*context, *own])
                for context in (prompt, [v.bos, *images], [v.bos])
            )
            guided = uncond + 1.2 * (image_cond - uncond) + 3.0 * (cond - image_cond)
            codes = guided[v.image_codes.start : v.image_codes.stop]
            assert result.ids[position] == v.image_codes.start + int(codes.argmax())


def _last_logits(model: medley.Model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.decoder(torch.tensor([ids])).logits[0, -1]
