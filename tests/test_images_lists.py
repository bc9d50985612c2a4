from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medley.errors import UserError
from medley.images.dataloader import ImageDataset, image_batches
from medley.images.preprocess import ImageError
from medley.images.sources import ImageList, Partition


def names(parts: list[Partition]) -> list[list[str]]:
    return [[source.name for source in part.sources] for part in parts]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_is_cut_into_fixed_parts(tmp_path: Path, kind: str) -> None:
    table = pd.DataFrame({"file": [f"{i}.png" for i in range(7)], "label": ["007"] * 7})
    path = tmp_path / f"list.{kind}"
    table.to_csv(path, index=False, encoding="utf-8-sig") if kind == "csv" else table.to_parquet(
        path
    )
    parts = list(ImageList(path, "file", keep_columns=True).parts(3))
    assert names(parts) == [["0.png", "1.png", "2.png"], ["3.png", "4.png", "5.png"], ["6.png"]]
    assert [p.number for p in parts] == [0, 1, 2]
    assert parts[2].kept is not None
    assert parts[2].kept.to_pylist() == [{"label": "007"}]
    limited = ImageList(path, "file", limit=4)
    assert names(list(limited.parts(3))) == [["0.png", "1.png", "2.png"], ["3.png"]]
    assert limited.digest(3).rows == limited.digest(2).rows == 4
    assert limited.digest(3).hexadecimal == limited.digest(2).hexadecimal


def test_parts_do_not_depend_on_how_a_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    pd.DataFrame({"img_path": np.arange(10_000).astype(str)}).to_csv(path, index=False)
    parts = list(ImageList(path).parts(1500))
    assert [name for part in names(parts) for name in part] == [str(i) for i in range(10_000)]
    assert [len(p.sources) for p in parts] == [1500] * 6 + [1000]


def test_a_folder_is_walked_in_order(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpg", "a.tiff", "notes.txt", ".hidden.png", "c.nii.gz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (part,) = ImageList(tmp_path).parts(100)
    found = [str(Path(n).relative_to(tmp_path)) for n in names([part])[0]]
    assert found == ["a.tiff", "b/1.jpg", "b/2.PNG", "c.nii.gz"]


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "png")
    return buffer.getvalue()


def test_pictures_in_a_webdataset_tar_are_read_in_place(tmp_path: Path) -> None:
    path = tmp_path / "shard-0.tar"
    write_tar(path, {
        "x/0.png": png(10), "x/0.txt": "ten ä".encode(),
        "x/1.json": b'{"a": 1}', "x/1.left.png": png(20), "x/1.right.png": png(30),
        "x/2.png": b"torn",
    })  # fmt: skip
    (part,) = ImageList(path, keep_columns=True).parts(100)
    stems = ["0.png", "1.left.png", "1.right.png", "2.png"]
    assert names([part]) == [[f"{path}/x/{stem}" for stem in stems]]
    assert part.kept is not None
    assert part.kept["txt"].to_pylist() == ["ten ä", None, None, None]
    assert part.kept["json"].to_pylist() == [None, '{"a": 1}', '{"a": 1}', None]
    assert part.kept["__key__"].to_pylist() == ["x/0", "x/1", "x/1", "x/2"]
    values = [np.asarray(source.open()).max() for source in part.sources[:3]]
    assert values == [10, 20, 30]
    with pytest.raises(ImageError, match=r"shard-0\.tar/x/2\.png"):
        part.sources[3].open()


def test_frames_become_pictures_of_their_own(tmp_path: Path) -> None:
    first, second = Image.new("L", (4, 4), 5), Image.new("L", (4, 4), 250)
    first.save(tmp_path / "stack.tif", save_all=True, append_images=[second])
    second.save(tmp_path / "z.png")
    (part,) = ImageList(tmp_path, keep_columns=True).parts(9)
    split = part.with_frames("all")
    stack = f"{tmp_path}/stack.tif"
    assert names([split]) == [[f"{stack}#0", f"{stack}#1", f"{tmp_path}/z.png"]]
    assert [np.asarray(s.open()).max() for s in split.sources] == [5, 250, 250]
    assert split.kept is not None
    assert len(split.kept) == 3
    chosen = part.with_frames("middle")
    assert names([chosen]) == names([part])
    assert np.asarray(chosen.sources[0].open()).max() == 250


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_order_and_name_what_failed(tmp_path: Path, workers: int) -> None:
    for value in range(7):
        Image.new("L", (8, 8), value).save(tmp_path / f"{value}.png")
    (tmp_path / "3.png").write_bytes(b"torn")
    listed = ImageList(tmp_path)
    batches = list(image_batches(listed.parts(4), ImageDataset(8, "crop"), 3, workers))
    assert [len(b.names) for b in batches] == [3, 1, 3]
    assert [b.ends_part for b in batches] == [False, True, True]
    assert [bool(e) for b in batches for e in b.errors] == [i == 3 for i in range(7)]
    values = [int(square.max()) for b in batches for square in b.squares]
    assert values == [0, 1, 2, 4, 5, 6]


def test_every_slice_of_a_volume_in_a_tar(tmp_path: Path) -> None:
    volume = np.arange(2 * 2 * 3, dtype=np.int16).reshape(2, 2, 3)
    nibabel.Nifti1Image(volume, np.eye(4)).to_filename(tmp_path / "v.nii.gz")
    path = tmp_path / "a.tar"
    write_tar(path, {"v.nii.gz": (tmp_path / "v.nii.gz").read_bytes(), "w.png": png(1)})
    (part,) = ImageList(path).parts(9)
    split = part.with_frames("all")
    assert names([split])[0][:3] == [f"{path}/v.nii.gz#{i}" for i in range(3)]
    values = [int(np.asarray(source.open()).max()) for source in split.sources[:3]]
    assert values == [round(int(volume[:, :, i].max()) / 11 * 255) for i in range(3)]


def test_links_in_a_tar_and_dicom_files_with_numbers_for_names_are_not_passed_over(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.png").write_bytes(png(9))
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
    (tmp_path / "1.2.840.113619.2.55.3").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "notes.md").write_text("nothing")
    (part,) = ImageList(tmp_path).parts(9)
    found = [str(Path(name).relative_to(tmp_path)) for name in names([part])[0]]
    assert found == ["1.2.840.113619.2.55.3", "a.png", "t.tar/a.png", "t.tar/b.png"]
    with pytest.raises(ImageError, match=r"b\.png"):
        part.sources[3].open()


def test_rows_of_another_width_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    for bad in ("a.png,m.png,", "a.png"):
        table.write_text(f"img_path,mask\nx.png,y.png\n{bad}\n")
        with pytest.raises(UserError, match=r"a row of \d fields, the header has 2.*line 3"):
            list(ImageList(table).parts(1))
    table.write_text('img_path,mask\n"a,1.png","two\nlines"\n\n')
    (part,) = ImageList(table, keep_columns=True).parts(9)
    assert names([part]) == [["a,1.png"]]
    assert part.kept is not None
    assert part.kept["mask"].to_pylist() == ["two\nlines"]


def test_names_that_no_file_can_have_are_failures_of_their_row(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    good.write_bytes(png(7))
    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(odd, "wb") as file:
        file.write(png(8))
    (batch,) = image_batches(ImageList(tmp_path).parts(9), ImageDataset(8, "crop"), 9, 0)
    assert batch.names == [f"{tmp_path}/caf\\udce9.png", str(good)]
    assert "its name is not UTF-8" in batch.errors[0]
    assert batch.errors[1] == ""
    table = tmp_path / "a.csv"
    table.write_text(f"img_path\na\0b.png\n{'x' * 300}#3\n{good}\n")
    (batch,) = image_batches(ImageList(table).parts(9), ImageDataset(8, "crop"), 9, 0)
    assert [bool(error) for error in batch.errors] == [True, True, False]


def test_a_link_that_leads_back_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads back"):
        list(ImageList(tmp_path).parts(1))


def test_what_is_no_list_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such image list"):
        ImageList(tmp_path / "none.csv")
    with pytest.raises(UserError, match="no pictures"):
        list(ImageList(tmp_path).parts(1))
    table = tmp_path / "a.csv"
    table.write_text("img_path\n")
    with pytest.raises(UserError, match="without a single row"):
        list(ImageList(table).parts(1))
    table.write_text("path,img_tokens\na.png,1\n")
    with pytest.raises(UserError, match=r"no column 'img_path', there are path, img_tokens"):
        list(ImageList(table).parts(1))
    with pytest.raises(UserError, match="would be written over"):
        list(ImageList(table, "path", keep_columns=True).parts(1))
    pd.DataFrame({"img_path": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="holds int64, expected paths"):
        list(ImageList(tmp_path / "a.parquet").parts(1))
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a table that can be read"):
        list(ImageList(tmp_path / "b.parquet").parts(1))


def test_a_torn_or_compressed_tar_is_refused(tmp_path: Path) -> None:
    members = {f"{i}.png": png(i) for i in range(30)}
    write_tar(tmp_path / "a.tar", members)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(UserError, match=r"a\.tar: not a tar that can be read"):
        list(ImageList(tmp_path / "a.tar").parts(100))
    write_tar(tmp_path / "b.tar", members, "w:gz")
    with pytest.raises(UserError, match=r"b\.tar: not a tar"):
        list(ImageList(tmp_path / "b.tar").parts(100))
