"""Which files are opened as images: one list of formats, one limit of pixels, bounded decoding."""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import zlib
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from test_images_medical import VALUES, dicom, gray

from medley.errors import UserError
from medley.images.folders import describe_skipped
from medley.images.formats import ALLOWED_FORMATS, open_pillow, suffixes
from medley.images.preprocess import ImageError, open_image
from medley.images.sources import ImageList

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n10 10 moveto\nshowpage\n"


def test_no_image_is_opened_without_the_list_of_formats() -> None:
    found = [
        f"{path}:{number}"
        for path in sorted((ROOT / "src").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"\bImage\.open\(", line) and "formats=ALLOWED_FORMATS" not in line
    ]
    assert not found


@pytest.fixture
def ghostscript_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stub of Ghostscript first on PATH, which writes its arguments to this file."""
    log, folder = tmp_path / "started", tmp_path / "bin"
    folder.mkdir()
    stub = folder / "gs"
    stub.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n')
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (EPS, "EPS is not opened, because reading it starts another program"),
        (b"\xc5\xd0\xd3\xc6" + bytes(40) + EPS, "EPS is not opened"),
        (b"\xd7\xcd\xc6\x9a" + bytes(60), "WMF is not opened"),
        (b"%PDF-1.7\n", "PDF is not an image"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "HEIC is not supported"),
        (b"<?xml version='1.0'?>\n<svg></svg>", "SVG is not supported"),
        (b"<!DOCTYPE html><html>404</html>", "A web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "The file is a Git LFS pointer",
        ),
        (b"", "The file is empty"),
        (b"some text", "Unsupported image format"),
    ],
)
def test_refused_format_is_named_and_starts_no_program(
    tmp_path: Path, ghostscript_log: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"^{path}: {message}") as error:
        open_image(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ImageError, match=message):
        open_pillow(io.BytesIO(content), "a.png")
    assert not ghostscript_log.exists()


def test_folder_reads_all_that_is_opened_and_counts_the_rest(tmp_path: Path) -> None:
    image = Image.new("L", (8, 8), 9)
    read = ["a.pgm", "b.ppm", "c.pbm", "d.jfif", "e.jpe", "f.jp2", "g.tif", "h.webp", "i.TGA"]
    for name in read:
        kind = {"pgm": "PPM", "pbm": "PPM", "jfif": "JPEG", "jpe": "JPEG"}.get(name[2:])
        (image.convert("1") if name == "c.pbm" else image.convert("RGB")).save(
            tmp_path / name, kind
        )
    for name in ("n.txt", "o.txt", "p.mp4", "README", ".DS_Store", "q.eps"):
        (tmp_path / name).write_bytes(EPS)
    images = ImageList(tmp_path)
    (partition,) = images.partitions(99)
    assert [Path(source.name).name for source in partition.sources] == read
    assert all(source.open().size == (8, 8) for source in partition.sources)
    expected = {".txt": 2, ".mp4": 1, ".eps": 1, "without suffix": 1, "hidden": 1}
    assert images.skipped == Counter(expected)
    assert describe_skipped(Counter({".txt": 2, ".mp4": 1})) == "3 files skipped: 2 .txt, 1 .mp4"
    list(images.partitions(99))
    assert images.skipped == Counter(expected)  # not counted twice


def test_suffixes_are_those_of_the_formats_of_pillow() -> None:
    registered = Image.registered_extensions()
    assert {registered[s] for s in suffixes() if s in registered} <= set(ALLOWED_FORMATS)
    assert not {".eps", ".ps", ".wmf", ".pdf", ".mpg", ".h5"} & set(suffixes())
    for suffix in (".pgm", ".jfif", ".jp2", ".tif", ".webp", ".dcm", ".nii.gz"):
        assert suffix in suffixes()


def test_folder_without_images_names_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UserError, match=r"No images found \(1 file skipped: 1 \.mp4\)"):
        list(ImageList(tmp_path).partitions(9))


# --- limits -----------------------------------------------------------------------------------


def test_later_frame_of_a_tiff_is_bounded_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tif"
    large = Image.new("L", (200, 200))
    Image.new("L", (4, 4)).save(path, save_all=True, append_images=[large])
    monkeypatch.setattr("medley.images.formats.MAX_PIXELS", 1000)
    assert open_image(f"{path}#0").size == (4, 4)
    with pytest.raises(ImageError, match=r"too many pixels \(got 200 x 200 = 40000, limit 1000\)"):
        open_image(f"{path}#1")


def test_frames_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dicom(tmp_path / "a.dcm", VALUES, NumberOfFrames=2**31 - 1)
    with pytest.raises(ImageError, match="too many frames"):
        open_image(path, "first")
    (partition,) = ImageList(path).partitions(9)
    assert len(partition.select_frames("all").sources) == 1
    monkeypatch.setattr("medley.images.formats.MAX_FRAMES", 2)
    image = Image.new("L", (4, 4))
    image.save(tmp_path / "a.tif", save_all=True, append_images=[image] * 2)
    with pytest.raises(ImageError, match=r"too many frames \(got 3, limit 2\)"):
        open_image(tmp_path / "a.tif", 0)


def test_dicom_of_too_many_pixels_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medley.images.formats.MAX_PIXELS", 3)
    with pytest.raises(ImageError, match=r"too many pixels \(got 2 x 2 = 4, limit 3\)"):
        open_image(dicom(tmp_path / "a.dcm", VALUES))


def test_compressed_nifti_bombs_are_not_decompressed(tmp_path: Path) -> None:
    volume = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
    raw = bytearray(volume.to_bytes())
    huge = raw.copy()
    huge[40:56] = np.array([3, 30000, 30000, 30000, 1, 1, 1, 1], "<i2").tobytes()
    far = raw.copy()
    far[108:112] = np.array([1e12], "<f4").tobytes()  # where the voxels begin
    extended = raw.copy()
    extended[348:352] = b"\1\0\0\0"
    extended[352:360] = np.array([2**31 - 16, 6], "<i4").tobytes()  # a header extension
    for number, content in enumerate((huge, far, extended)):
        path = tmp_path / f"{number}.nii.gz"
        path.write_bytes(gzip.compress(bytes(content) + bytes(1000)))
        if content is extended:
            open_image(path, 0)  # the extension is not read
        else:
            with pytest.raises(ImageError, match=r"NIfTI volume is too large|too many pixels"):
                open_image(path, 0)


def test_deflated_dicom_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = dicom(tmp_path / "a.dcm", VALUES).read_bytes()
    length = 132 + 12 + int.from_bytes(plain[140:144], "little")
    meta = plain[:length].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    old = int.from_bytes(plain[140:144], "little")
    uid = meta.index(b"1.2.840.10008.1.2.1.99")
    meta = meta[: uid - 2] + b"\x16\0" + meta[uid:]
    meta = meta[:140] + (old + 2).to_bytes(4, "little") + meta[144:]
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path = tmp_path / "deflated.dcm"
    path.write_bytes(meta + deflate.compress(plain[length:]) + deflate.flush())
    assert gray(path) == gray(tmp_path / "a.dcm")
    monkeypatch.setattr("medley.images.medical.MAX_DECODED_BYTES", 100)
    with pytest.raises(ImageError, match="deflated DICOM file is too large"):
        open_image(path)


# --- DICOM without meta header ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.dcm", "IM0001", "1.2.840.113619"])
@pytest.mark.parametrize("implicit", [True, False])
def test_dicom_without_meta_header_is_read(tmp_path: Path, name: str, implicit: bool) -> None:
    expected = gray(dicom(tmp_path / "complete.dcm", VALUES))
    path = without_meta(tmp_path, name, implicit=implicit)
    assert gray(path) == expected
    (partition,) = ImageList(tmp_path).partitions(9)
    assert str(path) in [source.name for source in partition.sources]


def without_meta(folder: Path, name: str, implicit: bool = True, little: bool = True) -> Path:
    """A DICOM file of `VALUES` without preamble and meta header."""
    from pydicom import dcmread, dcmwrite

    dataset = dcmread(dicom(folder / "with_meta.dcm", VALUES))
    (folder / "with_meta.dcm").unlink()
    del dataset.file_meta
    dataset.preamble = None
    path = folder / name
    dcmwrite(path, dataset, implicit_vr=implicit, little_endian=little)
    assert path.read_bytes()[128:132] != b"DICM"
    return path


def test_dicom_without_transfer_syntax_is_read(tmp_path: Path) -> None:
    from pydicom import dcmread, dcmwrite

    for syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        dataset = dcmread(dicom(tmp_path / "a.dcm", VALUES))
        dataset.file_meta.TransferSyntaxUID = syntax
        dcmwrite(tmp_path / "b.dcm", dataset, implicit_vr=syntax.is_implicit_VR, little_endian=True)
        content = bytearray((tmp_path / "b.dcm").read_bytes())
        element = content.index(b"\x02\x00\x10\x00UI")  # the transfer syntax
        size = 8 + int.from_bytes(content[element + 6 : element + 8], "little")
        del content[element : element + size]
        content[140:144] = (int.from_bytes(content[140:144], "little") - size).to_bytes(4, "little")
        (tmp_path / "b.dcm").write_bytes(content)
        assert gray(tmp_path / "b.dcm") == gray(tmp_path / "a.dcm")


def test_compressed_dicom_without_transfer_syntax_says_what_is_missing(tmp_path: Path) -> None:
    path = without_meta(tmp_path, "a.dcm", implicit=False)
    content = path.read_bytes()
    element = content.index(b"\xe0\x7f\x10\x00")
    pixels = (
        b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    )
    path.write_bytes(content[:element] + pixels)
    with pytest.raises(ImageError, match=r"compressed pixels and no transfer syntax \(0002,0010\)"):
        open_image(path)
