"""EXIF orientation belongs to the checkpoint, like fit: all that opens images obeys it."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image, ImageOps

import medley
from medley.checkpoints.checkpoint import open_checkpoint
from medley.checkpoints.conversion import write_hugging_face
from medley.commands.finetune_vqgan import FinetuneVqganOptions, choose_preprocessing
from medley.errors import UserError
from medley.images.dataloader import ImageDataset
from medley.images.image_source import ImageSource
from medley.images.preprocess import Preprocessing, to_rgb
from medley.inference.prompts import folder_images
from medley.phantoms.scenes import Phantom
from medley.serving.limits import Limits
from medley.serving.ui.image_store import ImageStore
from medley.serving.untrusted_inputs import RequestReader
from medley.tiny.embedded import checkpoint_folder
from medley.utils.manifest import check_fingerprint, read_manifest, write_manifest
from medley.vqgan.files import open_vqgan, read_vqgan, write_vqgan
from medley.vqgan.image_tokenizer import ImageTokenizer

ORIENTATION = 0x0112
MODES = ["RGB", "L", "RGBA", "P", "I;16"]


@pytest.fixture(scope="module")
def turning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, with a preprocessing that obeys EXIF."""
    folder = tmp_path_factory.mktemp("turning") / "ckpt"
    shutil.copytree(checkpoint_folder("tiny"), folder)
    file = folder / "tokenizer" / "vqgan.yaml"
    content = yaml.safe_load(file.read_text())
    assert content["preprocessing"] == {"fit": "crop"}  # the embedded model stays as it is
    content["preprocessing"]["exif_orientation"] = True
    file.chmod(0o644)
    file.write_text(yaml.safe_dump(content))
    return folder


def tagged_photograph(folder: Path, mode: str = "RGB") -> tuple[Path, Image.Image]:
    """A photograph that is stored upside down with the tag that says so, and how a viewer shows it.

    The format is lossless, so that both have the same pixels.
    """
    upright = Phantom("CT", "head", seed=5).image(64)
    if mode == "I;16":
        upright = Image.fromarray(np.asarray(upright.convert("L")).astype(np.uint16) * 256)
    elif mode == "RGBA":
        upright.putalpha(Image.linear_gradient("L").resize((64, 64)))
    else:
        upright = upright.convert(mode)
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    path = folder / "photograph.png"
    upright.transpose(Image.Transpose.ROTATE_180).save(path, exif=exif)
    return path, to_rgb(upright)


@pytest.mark.parametrize("mode", MODES)
def test_all_ways_into_the_model_see_the_upright_photograph(
    turning: Path, tmp_path: Path, mode: str
) -> None:
    path, upright = tagged_photograph(tmp_path, mode)
    tokenizer = ImageTokenizer.from_checkpoint(turning)
    expected = tokenizer.encode([upright])[0].tolist()
    other = ImageTokenizer.from_checkpoint("tiny").encode([upright])[0].tolist()
    assert other == expected  # an upright image has the same codes in both
    reader = RequestReader(Limits(), tokenizer, 100)
    uploaded = reader.part_from_base64(base64.b64encode(path.read_bytes()).decode(), "x").image
    assert uploaded is not None
    dataset = ImageDataset(tokenizer.size, tokenizer.preprocessing)
    _, squares = dataset.__getitems__([ImageSource(str(path), str(path))])
    (in_folder,) = folder_images(tmp_path, None)
    assert in_folder.image is not None
    with Image.open(path) as opened:
        opened.load()
    for codes in (
        tokenizer.encode([tokenizer.open_image(path)])[0],
        tokenizer.encode([opened])[0],  # opened by the caller
        tokenizer.encode([in_folder.image])[0],
        tokenizer.encode([uploaded])[0],
        tokenizer.encode_bytes(squares)[0],
        tokenizer.encode_pixels(tokenizer.pixels(opened)[None])[0],
    ):
        assert codes.tolist() == expected
    store = ImageStore(tmp_path / "store", exif_orientation=True)
    displayed = store.add_upload(str(path), Limits()).display_image
    assert np.array_equal(np.asarray(displayed), np.asarray(upright))


def test_chameleon_does_not_rotate(tmp_path: Path) -> None:
    path, upright = tagged_photograph(tmp_path)
    tokenizer = ImageTokenizer.from_checkpoint("tiny")
    assert tokenizer.preprocessing == Preprocessing("crop", exif_orientation=False)
    stored = upright.transpose(Image.Transpose.ROTATE_180)
    expected = tokenizer.encode([stored])[0].tolist()
    assert tokenizer.encode([tokenizer.open_image(path)])[0].tolist() == expected
    with Image.open(path) as opened:
        assert tokenizer.encode([opened])[0].tolist() == expected
        assert tokenizer.encode([ImageOps.exif_transpose(opened)])[0].tolist() != expected


def test_model_and_its_copy_in_hugging_faces_layout_obey(turning: Path, tmp_path: Path) -> None:
    path, upright = tagged_photograph(tmp_path)
    write_hugging_face(tmp_path / "hf", open_checkpoint(turning))
    assert open_vqgan(tmp_path / "hf").preprocessing.exif_orientation
    for ckpt in (turning, tmp_path / "hf"):
        model = medley.load(str(ckpt), device="cpu")
        expected = model.encode_prompt([upright, "Where is it?"])
        assert model.encode_prompt([path, "Where is it?"]) == expected
    model = medley.load("tiny", device="cpu")
    assert model.encode_prompt([path, "Where is it?"]) != expected
    with pytest.warns(UserWarning, match="preprocessing replaces that of"):
        open_checkpoint("tiny").image_tokenizer(turning / "tokenizer")


def test_codes_record_the_orientation_and_overriding_it_warns(
    turning: Path, tmp_path: Path, program: Callable[..., Any]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    _, upright = tagged_photograph(images)
    (images / "notes.txt").touch()

    def tokenize(name: str, *more: object) -> tuple[list[int], dict[str, Any], Any]:
        done = program("tokenizer.image_tokenization", "--input", images, "--output",
                       tmp_path / name, "--device", "cpu", *more)  # fmt: skip
        codes = pq.read_table(tmp_path / name / "partition_0_rank_0.parquet")["img_tokens"]
        return codes[0].as_py(), read_manifest(tmp_path / name), done

    tokenizer = ImageTokenizer.from_checkpoint("tiny")
    expected = tokenizer.encode([upright])[0].tolist()
    codes, manifest, done = tokenize("own", "--ckpt", turning)
    assert codes == expected
    assert manifest["exif_orientation"] is manifest["run"]["exif_orientation"] is True
    assert manifest["skipped_files"] == {".txt": 1}
    assert "1 file skipped: 1 .txt" in done.stdout
    assert "Other than the preprocessing" not in done.stderr
    codes, manifest, done = tokenize("tiny", "--ckpt", "tiny")
    assert codes != expected
    assert manifest["exif_orientation"] is False
    codes, manifest, done = tokenize("override", "--ckpt", "tiny", "--exif_orientation")
    assert codes == expected
    assert manifest["exif_orientation"] is True
    assert "--exif_orientation: Other than the preprocessing of tiny" in done.stderr
    _, _, done = tokenize("off", "--ckpt", turning, "--no_exif_orientation", "--fit", "pad")
    assert "--exif_orientation: Other than" in done.stderr
    assert "--fit: Other than" in done.stderr


@pytest.mark.parametrize(
    "recorded", [{"exif_orientation": True}, {"run": {"exif_orientation": True}}]
)
def test_codes_of_another_orientation_warn(tmp_path: Path, recorded: dict[str, Any]) -> None:
    write_manifest(tmp_path, {}, [], "f", **recorded)
    with pytest.warns(UserWarning, match="--exif_orientation true, ckpt uses false"):
        check_fingerprint(tmp_path, "f", "ckpt", Preprocessing().describe())
    check_fingerprint(tmp_path, "f", "ckpt", Preprocessing(exif_orientation=True).describe())


def test_entry_of_the_configuration_is_checked(turning: Path, tmp_path: Path) -> None:
    vqgan, preprocessing = read_vqgan(turning / "tokenizer")
    write_vqgan(tmp_path, vqgan, preprocessing)
    file = tmp_path / "vqgan.yaml"
    content = yaml.safe_load(file.read_text())
    assert content["preprocessing"] == {"fit": "crop", "exif_orientation": True}
    for entry, message in (
        ({"exif_orientation": "yes"}, r"got 'yes', expected true or false"),
        ({"exif_orientation": 1}, r"got 1, expected true or false"),
        ({"fit": "stretch"}, r"got 'stretch', expected crop or pad"),
        ({"fit": ["crop"]}, r"Invalid preprocessing\.fit"),
        ({"rotate": True}, r"Unknown preprocessing field 'rotate'"), ([1], "expected a mapping"),
    ):  # fmt: skip
        file.write_text(yaml.safe_dump({**content, "preprocessing": entry}))
        with pytest.raises(UserError, match=message):
            read_vqgan(tmp_path)
    del content["preprocessing"]  # as in Chameleon's own files
    file.write_text(yaml.safe_dump(content))
    assert read_vqgan(tmp_path)[1] == Preprocessing()


def test_invalid_tag_is_ignored(tmp_path: Path) -> None:
    tokenizer = ImageTokenizer.from_checkpoint("tiny")
    tokenizer.preprocessing = Preprocessing(exif_orientation=True)
    image = Image.new("RGB", (9, 9), "red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert np.array_equal(np.asarray(tokenizer.open_image(tmp_path / "a.png")), np.asarray(image))


def test_new_codes_obey_and_a_new_decoder_of_old_codes_does_not(tmp_path: Path) -> None:
    def options(**more: Any) -> FinetuneVqganOptions:
        return FinetuneVqganOptions(input=tmp_path, output=tmp_path, ckpt="tiny", **more)

    chameleon, turned = Preprocessing("pad"), Preprocessing("pad", exif_orientation=True)
    assert choose_preprocessing(options(), chameleon) == turned
    assert choose_preprocessing(options(exif_orientation=False), turned) == chameleon
    assert choose_preprocessing(options(trainable="decoder"), chameleon) == chameleon
    assert choose_preprocessing(options(trainable="decoder"), turned) == turned
    with pytest.raises(UserError, match="--exif_orientation: Other than that of tiny"):
        choose_preprocessing(options(trainable="decoder", exif_orientation=True), chameleon)
