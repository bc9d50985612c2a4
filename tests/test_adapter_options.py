"""Every kind of LoRA adapter that PEFT makes: merged as PEFT merges it, or refused by name."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from medley.checkpoints.adapter import load_adapter, merged_tensors
from medley.checkpoints.checkpoint import Checkpoint, open_checkpoint
from medley.checkpoints.conversion import write_hugging_face
from medley.errors import UserError
from medley.generation.config import GenerationOptions
from medley.generation.sequence import Request
from medley.inference.loading import load, share_base

TARGETS = ["q_proj", "v_proj", "down_proj"]
BDLORA = peft.tuners.lora.config.BdLoraConfig


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    folder = Path(__file__).parent / "golden" / "checkpoints" / "chameleon_7b_layout" / "input"
    return open_checkpoint(folder)


def train(
    base: Checkpoint, folder: Path, options: dict[str, Any], resize: int = 0
) -> peft.PeftModel:
    """An adapter with random weights, saved by PEFT."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    decoder = base.decoder(torch.float32)
    if resize:
        decoder.resize_token_embeddings(decoder.config.vocab_size + resize)
    model = peft.get_peft_model(decoder, peft.LoraConfig(**{**settings, **options}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "vqmodel" not in name:
                weight.add_(torch.randn(weight.shape) * 0.05)
    model.eval().save_pretrained(folder)
    return model


def logits(decoder: Any) -> torch.Tensor:
    with torch.inference_mode():
        return decoder(input_ids=torch.arange(4, 40)[None]).logits


LAYER = "model.layers.0.self_attn"
MERGED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"r": 1},
    "rank above width": {"r": 100},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.1},
    "regex": {"target_modules": r".*layers\.0\.self_attn\.(q|k)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"exclude_modules": r".*layers\.0.*"},
    "one layer": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "rank by name": {"rank_pattern": {"q_proj": 2}},
    "rank by regex": {"rank_pattern": {r".*layers\.0\..*(q_proj|v_proj)": 8}},
    "alpha by path": {"alpha_pattern": {rf"^{LAYER}.q_proj": 64, "v_proj": 3}},
    "patterns and rslora": {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "no init": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "ensure_weight_tying": {"ensure_weight_tying": True},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved norms": {"modules_to_save": ["norm", "q_norm", "k_norm"]},
    "saved norm alone": {"modules_to_save": ["q_norm"]},
    "head rows": {"trainable_token_indices": {"lm_head": [5, 17, 8000]}},
    "embedding rows": {"trainable_token_indices": [5, 17]},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [6, 7]}},
    "embedding target": {"target_modules": [*TARGETS, "embed_tokens"]},
    "embedding rslora": {"target_modules": ["embed_tokens"], "use_rslora": True},
    "head target": {"target_modules": [*TARGETS, "lm_head"]},
    "head alone": {"target_modules": ["lm_head"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding and saved head": {
        "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"],
    },
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "block-diagonal A": {"use_bdlora": BDLORA(
        target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False,
    )},
    "block-diagonal B": {"use_bdlora": BDLORA(
        target_modules_bd_b=["q_proj"], nblocks=2, match_strict=False,
    )},
    "block-diagonal both": {
        "use_bdlora": BDLORA(
            target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2,
            match_strict=False,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.filterwarnings("ignore")
def test_merges_and_applies_as_peft_does(kind: str, base: Checkpoint, tmp_path: Path) -> None:
    model = train(base, tmp_path, MERGED[kind])
    trained = logits(model)
    applied = logits(load_adapter(base.decoder(torch.float32), tmp_path))
    assert torch.allclose(applied, trained, atol=1e-5)
    expected = model.merge_and_unload().state_dict()
    found = dict(merged_tensors(base, tmp_path))
    for name, tensor in found.items():
        rounded = expected[name].to(tensor.dtype).float()
        assert torch.allclose(tensor.float(), rounded, rtol=2**-7, atol=1e-6), name
    unmerged = dict(base.tensors())
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, unmerged[name])]
    assert changed


REFUSED: dict[str, dict[str, Any]] = {
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "init_lora_weights olora": {"init_lora_weights": "olora"},
    "use_dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "layer_replication": {"layer_replication": [[0, 1], [0, 1]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [10, 11]},
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refuses_to_merge_by_the_options_name(kind: str, base: Checkpoint, tmp_path: Path) -> None:
    train(base, tmp_path, REFUSED[kind])
    with pytest.raises(UserError, match=f"Unsupported {kind.split()[0]} "):
        merged_tensors(base, tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("use_new_thing", True, "Unsupported use_new_thing .*newer PEFT"),
        ("kasa_config", {"beta": 1e-4}, "Unsupported kasa_config"),
        ("velora_config", {"num_groups": 4}, "Unsupported velora_config"),
        ("monteclora_config", {"num_samples": 4}, "Unsupported monteclora_config"),
        ("use_qalora", True, "Unsupported use_qalora"),
        ("arrow_config", {"top_k": 2}, "Unsupported arrow_config"),
        ("init_lora_weights", "corda", "Unsupported init_lora_weights"),
        ("init_lora_weights", "lora_ga", "Unsupported init_lora_weights"),
        ("init_lora_weights", "loftq", "Unsupported init_lora_weights"),
        ("init_lora_weights", "of a newer PEFT", "Unsupported init_lora_weights"),
        ("peft_type", "ADALORA", "Unsupported peft_type"),
        ("r", "x", "Unsupported r "),
        ("r", 8, "r does not fit the tensors"),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern does not fit"),
        ("rank_pattern", {"(": 2}, "regular expression"),
        ("alpha_pattern", {"q_proj": 2, ".*q_proj": 4}, "alpha_pattern has several values"),
        ("trainable_token_indices", "x", "Unsupported trainable_token_indices"),
    ],
)
def test_refuses_options_in_the_file(
    option: str, value: Any, message: str, base: Checkpoint, tmp_path: Path
) -> None:
    train(base, tmp_path, {})
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    with pytest.raises(UserError, match=message):
        merged_tensors(base, tmp_path)


def test_unused_options_of_a_newer_peft_pass(base: Checkpoint, tmp_path: Path) -> None:
    train(base, tmp_path, {})
    path = tmp_path / "adapter_config.json"
    config = {**json.loads(path.read_text()), "new_1": None, "new_2": False, "new_3": {}}
    path.write_text(json.dumps(config))
    assert dict(merged_tensors(base, tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_resized_vocabulary_is_one_sentence(base: Checkpoint, tmp_path: Path) -> None:
    train(base, tmp_path, {"modules_to_save": ["embed_tokens", "lm_head"]}, resize=2)
    for use in (
        lambda: merged_tensors(base, tmp_path),
        lambda: load_adapter(base.decoder(torch.float32), tmp_path),
    ):
        with pytest.raises(UserError, match=r"rows, the base .* Were tokens added"):
            use()


def test_merges_names_that_contain_the_adapters_name(base: Checkpoint, tmp_path: Path) -> None:
    train(base, tmp_path, {})
    expected = dict(merged_tensors(base, tmp_path))
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    renamed = {n.replace(".weight", ".default.weight"): t for n, t in tensors.items()}
    save_file(renamed, weights)
    assert all(torch.equal(t, expected[n]) for n, t in merged_tensors(base, tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_copy_of_another_bases_head_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    train(base, tmp_path, {"target_modules": ["lm_head"]})
    weights = tmp_path / "adapter_model.safetensors"
    tensors = {n: t + 1 if ".base_layer." in n else t for n, t in load_file(weights).items()}
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"copy of the base's lm_head\.weight differs"):
        merged_tensors(base, tmp_path)


APPLIED: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.parametrize("kind", APPLIED)
@pytest.mark.filterwarnings("ignore")
def test_applies_what_it_refuses_to_merge(kind: str, base: Checkpoint, tmp_path: Path) -> None:
    trained = logits(train(base, tmp_path, APPLIED[kind]))
    applied = load_adapter(base.decoder(torch.float32), tmp_path)
    assert torch.allclose(logits(applied), trained, atol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "layer_replication"])
@pytest.mark.filterwarnings("ignore")
def test_generates_with_an_applied_adapter(kind: str, base: Checkpoint, tmp_path: Path) -> None:
    train(base, tmp_path, APPLIED[kind])
    model = load(str(base.folder), adapter=tmp_path, device="cpu", dtype="float32")
    v = model.vocabulary
    prompt = [v.bos, *sorted(v.text_tokens)[100:108], v.end_turn]
    options = GenerationOptions(
        mode="text", text_greedy=True, repetition_penalty=1.0, max_new_tokens=8
    )
    found = model.engine.generate([Request(prompt, options, 0)])[0].ids
    with torch.inference_mode():
        scores = model.decoder(input_ids=torch.tensor([[*prompt, *found[:-1]]])).logits[0]
    allowed = torch.tensor(sorted({*v.text_tokens, v.eos, v.end_turn}))
    greedy = allowed[scores[len(prompt) - 1 :, allowed].argmax(-1)]
    assert greedy.tolist() == list(found)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"alora_invocation_tokens": [10, 11]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refuses_to_apply_by_the_options_name(
    options: dict[str, Any], option: str, base: Checkpoint, tmp_path: Path
) -> None:
    train(base, tmp_path, options)
    with pytest.raises(UserError, match=f"Unsupported {option} "):
        load_adapter(base.decoder(torch.float32), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"bias": "all"},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"target_modules": ["embed_tokens"]},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_change_their_base_do_not_share_it(
    options: dict[str, Any], base: Checkpoint, tmp_path: Path
) -> None:
    train(base, tmp_path, options)
    model = load(str(base.folder), device="cpu", dtype="float32")
    before = {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}
    with pytest.raises(UserError, match="changes weights of its base, which other models share"):
        share_base(model, base, tmp_path)
    after = model.decoder.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.filterwarnings("ignore")
def test_pefts_auto_classes_load_an_adapter_without_a_task_type(
    base: Checkpoint, tmp_path: Path
) -> None:
    write_hugging_face(tmp_path / "base", base)
    decoder = open_checkpoint(tmp_path / "base").decoder(torch.float32)
    decoder.name_or_path = str(tmp_path / "base")
    model = peft.get_peft_model(decoder, peft.LoraConfig(target_modules=TARGETS))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.randn(weight.shape) * 0.05)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    text = sorted(base.text_tokenizer().vocabulary.text_tokens)
    assert torch.allclose(logits(loaded)[..., text], logits(model)[..., text], atol=1e-5)


def test_decoders_are_pickled_and_copied_as_themselves(base: Checkpoint) -> None:
    decoder = base.decoder(torch.float32)
    for twin in (pickle.loads(pickle.dumps(decoder)), copy.deepcopy(decoder)):
        assert type(twin) is type(decoder)
        assert torch.equal(logits(twin), logits(decoder))
