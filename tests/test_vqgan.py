"""The VQGAN: parity with recorded cases and transformers, files, fingerprint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from medley.checkpoints.checkpoint import open_checkpoint
from medley.errors import UserError
from medley.vqgan import VQGAN, VQGANConfig
from medley.vqgan.files import read_vqgan, to_hugging_face_config
from medley.vqgan.image_tokenizer import ImageTokenizer, token_space_fingerprint


def test_codes_and_pixels_equal_recorded_cases(layout: Path) -> None:
    expected = load_file(layout / "expected.safetensors")
    tokenizer = ImageTokenizer.from_checkpoint(layout / "input")
    assert torch.equal(tokenizer.encode_pixels(expected["vq_pixels"]), expected["vq_codes"])
    decoded = tokenizer.decode_pixels(expected["vq_codes"])
    assert torch.allclose(decoded, expected["vq_decoded"], atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        VQGANConfig(32, (1, 2, 2), 1, 64, 16, 16, 512),
        VQGANConfig(32, (1, 1, 2), 2, 64, 16, 16, 512, attn_resolutions=(16,)),
        # Chameleon's shape and resolution, with a smaller width for a fast test.
        VQGANConfig(32, (1, 1, 2, 2, 4), 2, 512, 256, 256, 8192),
    ],
    ids=["small", "attention", "512"],
)
def test_encoder_equals_transformers(config: VQGANConfig) -> None:
    torch.manual_seed(0)
    ours = VQGAN(config).eval()
    fields = to_hugging_face_config(config)
    theirs = transformers.ChameleonVQVAE._from_config(transformers.ChameleonVQVAEConfig(**fields))
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("decoder.")}
    theirs.load_state_dict(state)
    pixels = torch.rand(1, 3, config.resolution, config.resolution) * 2 - 1
    with torch.inference_mode():
        codes = ours.encode(pixels)
        expected = theirs.eval().encode(pixels).image_tokens.reshape(1, -1)
    assert torch.equal(codes, expected)
    assert codes.shape == (1, config.codes_per_image)


def test_fingerprint_covers_the_encoder_but_not_the_decoder() -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(32, (1, 2), 1, 32, 8, 8, 64))
    before = token_space_fingerprint(vqgan)
    with torch.no_grad():
        vqgan.decoder.conv_out.bias.add_(1)
    assert token_space_fingerprint(vqgan) == before
    with torch.no_grad():
        vqgan.quantize.embedding.weight[0, 0] += 1
    assert token_space_fingerprint(vqgan) != before


def test_invalid_codes_and_pixels_are_refused() -> None:
    tokenizer = ImageTokenizer(VQGAN(VQGANConfig(32, (1, 2), 1, 8, 8, 8, 64)))
    with pytest.raises(UserError, match="0 to 63"):
        tokenizer.decode_pixels(torch.full((1, 16), 64))
    with pytest.raises(UserError, match=r"expected \(B, 16\)"):
        tokenizer.decode_pixels(torch.zeros(1, 15, dtype=torch.int64))
    with pytest.raises(UserError, match="expected"):
        tokenizer.encode_pixels(torch.zeros(1, 3, 9, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"double_z": True}, "double_z"),
        ({"ch": 30}, "multiple of 32"),
        ({"resolution": 65}, "multiple of the downsampling"),
        ({"z_channels": None}, "vqgan.yaml"),
        ({"ch": 64}, "do not fit ch and ch_mult"),
        ({"num_res_blocks": 2}, "do not fit num_res_blocks"),
    ],
)
def test_invalid_configurations_give_the_reason(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    source = open_checkpoint("tiny").tokenizer_folder
    parsed = yaml.safe_load((source / "vqgan.yaml").read_text())
    parsed["model"]["params"]["ddconfig"] |= change
    (tmp_path / "vqgan.yaml").write_text(yaml.safe_dump(parsed))
    (tmp_path / "vqgan.ckpt").write_bytes((source / "vqgan.ckpt").read_bytes())
    with pytest.raises(UserError, match=message):
        read_vqgan(tmp_path)


class ModelCheckpoint:
    """Represents the Lightning class that a published vqgan.ckpt mentions."""


def test_a_lightning_checkpoint_is_loaded_without_its_classes(tmp_path: Path) -> None:
    source = open_checkpoint("tiny").tokenizer_folder
    state = torch.load(source / "vqgan.ckpt", weights_only=True)["state_dict"]
    name, module = ModelCheckpoint.__qualname__, ModelCheckpoint.__module__
    try:
        import sys
        import types

        fake = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
        fake.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
        sys.modules["pytorch_lightning"] = types.ModuleType("pytorch_lightning")
        sys.modules["pytorch_lightning.callbacks"] = types.ModuleType("callbacks")
        sys.modules[fake.__name__] = fake
        ModelCheckpoint.__module__ = fake.__name__
        extra = {"callbacks": {ModelCheckpoint: {"best": 1}}, "loss.x": torch.zeros(1)}
        torch.save({"state_dict": state, **extra}, tmp_path / "vqgan.ckpt")
    finally:
        ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = module, name
        for key in [k for k in sys.modules if k.startswith("pytorch_lightning")]:
            del sys.modules[key]
    (tmp_path / "vqgan.yaml").write_bytes((source / "vqgan.yaml").read_bytes())
    vqgan, _ = read_vqgan(tmp_path)
    assert token_space_fingerprint(vqgan) == open_checkpoint("tiny").fingerprint()


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code ran",))


def test_a_pickle_that_contains_code_is_refused(tmp_path: Path) -> None:
    source = open_checkpoint("tiny").tokenizer_folder
    (tmp_path / "vqgan.yaml").write_bytes((source / "vqgan.yaml").read_bytes())
    torch.save({"state_dict": Malicious()}, tmp_path / "vqgan.ckpt")
    with pytest.raises(UserError, match=r"vqgan\.ckpt: The pickle contains more than tensors"):
        read_vqgan(tmp_path)


def test_a_git_lfs_pointer_is_reported(tmp_path: Path) -> None:
    source = open_checkpoint("tiny").tokenizer_folder
    (tmp_path / "vqgan.yaml").write_bytes((source / "vqgan.yaml").read_bytes())
    (tmp_path / "vqgan.ckpt").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    with pytest.raises(UserError, match="git lfs pull"):
        read_vqgan(tmp_path)
