"""Opening checkpoints: every layout, shared and new objects, and the number of constructions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from medley import ImageTokenizer
from medley.checkpoints.chameleon import ChameleonWeights
from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import write_hugging_face
from medley.data.vocabulary import TextTokenizer
from medley.errors import UserError
from medley.modeling.dims import ModelDims
from medley.tiny.embedded import tiny_folder
from medley.trainer.options import TrainOptions
from medley.trainer.run import make_model, make_sample_callback, open_datasets, packing_config
from medley.vqgan import VQGAN
from medley.vqgan.files import open_vqgan


@pytest.fixture
def constructions(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the constructions of VQGANs, text tokenizers and readers of Chameleon's weights."""
    counts: Counter[str] = Counter()

    def count_calls(kind: type, method: str) -> None:
        original = getattr(kind, method)

        def counted(self: Any, *args: Any, **kwargs: Any) -> None:
            counts[kind.__name__] += 1
            original(self, *args, **kwargs)

        monkeypatch.setattr(kind, method, counted)

    for kind in (VQGAN, TextTokenizer, ChameleonWeights):
        count_calls(kind, "__init__")
    return counts


@pytest.mark.parametrize("layout_name", ["chameleon", "huggingface", "encoder only"])
def test_a_checkpoint_reads_each_part_once(
    layout_name: str, tmp_path: Path, constructions: Counter[str]
) -> None:
    folder = tiny_folder()
    if layout_name != "chameleon":
        folder = hugging_face_folder(tmp_path, with_decoder=layout_name == "huggingface")
    constructions.clear()
    checkpoint = open_checkpoint(folder)
    for _ in range(2):
        checkpoint.vqgan()
        checkpoint.fingerprint()
        checkpoint.config()
        checkpoint.dtype()
        checkpoint.decoder()
        checkpoint.text_tokenizer()
        checkpoint.image_tokenizer()
    weights = {"ChameleonWeights": 1} if layout_name == "chameleon" else {}
    assert constructions == {"VQGAN": 1, "TextTokenizer": 1, **weights}


def test_a_training_start_reads_each_part_once(
    training_data: Path, tmp_path: Path, constructions: Counter[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"text": "Is there a cyst?"}\n')
    options = TrainOptions(
        train_data=[str(training_data / "train.jsonl")], val_data=training_data / "val.jsonl",
        ckpt="tiny", output_dir=tmp_path / "run", sample_prompts=tmp_path / "prompts.jsonl",
    )  # fmt: skip
    base = open_checkpoint("tiny")
    vocabulary = base.text_tokenizer().vocabulary
    open_datasets(options, packing_config(options, base), base, vocabulary)
    make_model(options, base, vocabulary)
    make_sample_callback(options, base, lambda: None)
    assert constructions == {"VQGAN": 1, "TextTokenizer": 1, "ChameleonWeights": 1}


def hugging_face_folder(tmp_path: Path, with_decoder: bool) -> Path:
    write_hugging_face(tmp_path / "hf", open_checkpoint("tiny"))
    if not with_decoder:
        for name in ("vqgan.yaml", "vqgan.ckpt"):
            (tmp_path / "hf" / "tokenizer" / name).unlink()
    return tmp_path / "hf"


def test_image_tokenizers_and_decoders_do_not_share_memory_with_the_checkpoint() -> None:
    checkpoint = open_checkpoint("tiny")
    fingerprint = checkpoint.fingerprint()
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors()}
    vqgan = {name: tensor.clone() for name, tensor in checkpoint.vqgan().vqgan.state_dict().items()}
    half = checkpoint.image_tokenizer(dtype=torch.bfloat16)
    assert half.vqgan.encoder.conv_in.weight.dtype == torch.bfloat16
    config = checkpoint.config()
    config.hidden_size = 1
    for dtype in (None, torch.bfloat16):
        decoder = checkpoint.decoder(dtype)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.zero_()
    assert checkpoint.config().hidden_size != 1
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in checkpoint.tensors())
    state = checkpoint.vqgan().vqgan.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in vqgan.items())
    assert checkpoint.image_tokenizer().fingerprint == fingerprint


def test_image_tokenizer_opens_every_kind_of_folder(tmp_path: Path) -> None:
    hugging_face = hugging_face_folder(tmp_path, with_decoder=True)
    image = Image.new("RGB", (80, 60), "gray")
    expected = ImageTokenizer.from_checkpoint("tiny").encode([image])
    folders = [
        tiny_folder(), tiny_folder() / "tokenizer", tiny_folder() / "models" / "tiny",
        hugging_face, hugging_face / "tokenizer",
    ]  # fmt: skip
    for folder in folders:
        tokenizer = ImageTokenizer.from_checkpoint(str(folder))
        assert tokenizer.has_decoder
        assert torch.equal(tokenizer.encode([image]), expected)


def test_the_vqgan_of_a_published_hugging_face_folder_has_no_decoder(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path, with_decoder=False)
    tokenizer = ImageTokenizer.from_checkpoint(folder, dtype=torch.float32)
    assert tokenizer.fingerprint == open_checkpoint("tiny").fingerprint()
    with pytest.raises(UserError, match="has no VQGAN decoder"):
        tokenizer.decode_pixels(torch.zeros(1, tokenizer.codes_per_image, dtype=torch.int64))


def test_folders_without_a_vqgan_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: Folder not found .*`tiny`"):
        open_vqgan(tmp_path / "none")
    with pytest.raises(UserError, match="No VQGAN found"):
        open_vqgan(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="An adapter has no VQGAN"):
        open_vqgan(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"Unsupported model_type \(got 'llama'"):
        open_vqgan(tmp_path)


def test_model_dims_convert_to_a_config_and_back(layout: Path) -> None:
    checkpoint = open_checkpoint(layout / "input")
    dims = checkpoint.chameleon_weights.dims
    assert ModelDims.from_config(checkpoint.config()) == dims
    assert checkpoint.config().bos_token_id == checkpoint.text_tokenizer().vocabulary.bos
