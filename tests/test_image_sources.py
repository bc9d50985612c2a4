from __future__ import annotations

import io
import os
import tarfile
import unicodedata
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medley.errors import UserError
from medley.images.dataloader import ImageDataset, image_batches
from medley.images.preprocess import ImageError, Preprocessing, open_image
from medley.images.sources import ImageList, Partition


def names(partitions: list[Partition]) -> list[list[str]]:
    return [[source.name for source in partition.sources] for partition in partitions]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_table_is_divided_into_fixed_partitions(tmp_path: Path, kind: str) -> None:
    table = pd.DataFrame({"file": [f"{i}.png" for i in range(7)], "label": ["007"] * 7})
    path = tmp_path / f"list.{kind}"
    table.to_csv(path, index=False, encoding="utf-8-sig") if kind == "csv" else table.to_parquet(
        path
    )
    partitions = list(ImageList(path, "file", keep_columns=True).partitions(3))
    assert names(partitions) == [
        ["0.png", "1.png", "2.png"],
        ["3.png", "4.png", "5.png"],
        ["6.png"],
    ]
    assert [p.number for p in partitions] == [0, 1, 2]
    assert partitions[2].extra_columns is not None
    assert partitions[2].extra_columns.to_pylist() == [{"label": "007"}]
    limited = ImageList(path, "file", limit=4)
    assert names(list(limited.partitions(3))) == [["0.png", "1.png", "2.png"], ["3.png"]]
    assert limited.digest(3).rows == limited.digest(2).rows == 4
    assert limited.digest(3).hexdigest() == limited.digest(2).hexdigest()


def test_partitions_do_not_depend_on_read_chunks(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    pd.DataFrame({"img_path": np.arange(10_000).astype(str)}).to_csv(path, index=False)
    partitions = list(ImageList(path).partitions(1500))
    assert [name for own in names(partitions) for name in own] == [str(i) for i in range(10_000)]
    assert [len(p.sources) for p in partitions] == [1500] * 6 + [1000]


def test_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpg", "a.tiff", "notes.txt", ".hidden.png", "c.nii.gz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (partition,) = ImageList(tmp_path).partitions(100)
    listed = [str(Path(n).relative_to(tmp_path)) for n in names([partition])[0]]
    assert listed == ["a.tiff", "b/1.jpg", "b/2.PNG", "c.nii.gz"]


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


def test_images_in_webdataset_tar_are_read_in_place(tmp_path: Path) -> None:
    path = tmp_path / "shard-0.tar"
    write_tar(path, {
        "x/0.png": png(10), "x/0.txt": "ten ä".encode(),
        "x/1.json": b'{"a": 1}', "x/1.left.png": png(20), "x/1.right.png": png(30),
        "x/2.png": b"broken",
    })  # fmt: skip
    (partition,) = ImageList(path, keep_columns=True).partitions(100)
    stems = ["0.png", "1.left.png", "1.right.png", "2.png"]
    assert names([partition]) == [[f"{path}/x/{stem}" for stem in stems]]
    assert partition.extra_columns is not None
    assert partition.extra_columns["txt"].to_pylist() == ["ten ä", None, None, None]
    assert partition.extra_columns["json"].to_pylist() == [None, '{"a": 1}', '{"a": 1}', None]
    assert partition.extra_columns["__key__"].to_pylist() == ["x/0", "x/1", "x/1", "x/2"]
    values = [np.asarray(source.open()).max() for source in partition.sources[:3]]
    assert values == [10, 20, 30]
    with pytest.raises(ImageError, match=r"shard-0\.tar/x/2\.png"):
        partition.sources[3].open()


def test_each_frame_becomes_an_image(tmp_path: Path) -> None:
    first, second = Image.new("L", (4, 4), 5), Image.new("L", (4, 4), 250)
    first.save(tmp_path / "stack.tif", save_all=True, append_images=[second])
    second.save(tmp_path / "z.png")
    (partition,) = ImageList(tmp_path, keep_columns=True).partitions(9)
    expanded = partition.select_frames("all")
    stack = f"{tmp_path}/stack.tif"
    assert names([expanded]) == [[f"{stack}#0", f"{stack}#1", f"{tmp_path}/z.png"]]
    assert [np.asarray(s.open()).max() for s in expanded.sources] == [5, 250, 250]
    assert expanded.extra_columns is not None
    assert len(expanded.extra_columns) == 3
    selected = partition.select_frames("middle")
    assert names([selected]) == names([partition])
    assert np.asarray(selected.sources[0].open()).max() == 250


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_order_and_report_failures(tmp_path: Path, workers: int) -> None:
    for value in range(7):
        Image.new("L", (8, 8), value).save(tmp_path / f"{value}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    images = ImageList(tmp_path)
    batches = list(
        image_batches(images.partitions(4), ImageDataset(8, Preprocessing()), 3, workers)
    )
    assert [len(b.names) for b in batches] == [3, 1, 3]
    assert [b.ends_partition for b in batches] == [False, True, True]
    assert [bool(e) for b in batches for e in b.errors] == [i == 3 for i in range(7)]
    values = [int(image.max()) for b in batches for image in b.images]
    assert values == [0, 1, 2, 4, 5, 6]


def test_all_slices_of_volume_in_tar_are_read(tmp_path: Path) -> None:
    volume = np.arange(2 * 2 * 3, dtype=np.int16).reshape(2, 2, 3)
    nibabel.Nifti1Image(volume, np.eye(4)).to_filename(tmp_path / "v.nii.gz")
    path = tmp_path / "a.tar"
    write_tar(path, {"v.nii.gz": (tmp_path / "v.nii.gz").read_bytes(), "w.png": png(1)})
    (partition,) = ImageList(path).partitions(9)
    expanded = partition.select_frames("all")
    assert names([expanded])[0][:3] == [f"{path}/v.nii.gz#{i}" for i in range(3)]
    values = [int(np.asarray(source.open()).max()) for source in expanded.sources[:3]]
    assert values == [round(int(volume[:, :, i].max()) / 11 * 255) for i in range(3)]


def test_links_in_tar_and_dicom_files_with_numeric_suffix_are_listed(
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
    (partition,) = ImageList(tmp_path).partitions(9)
    listed = [str(Path(name).relative_to(tmp_path)) for name in names([partition])[0]]
    assert listed == ["1.2.840.113619.2.55.3", "a.png", "t.tar/a.png", "t.tar/b.png"]
    with pytest.raises(ImageError, match=r"b\.png"):
        partition.sources[3].open()


def test_rows_with_wrong_number_of_fields_raise(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    for bad in ("a.png,m.png,", "a.png"):
        table.write_text(f"img_path,mask\nx.png,y.png\n{bad}\n")
        with pytest.raises(UserError, match=r"A row has \d fields \(expected 2.*line 3"):
            list(ImageList(table).partitions(1))
    table.write_text('img_path,mask\n"a,1.png","two\nlines"\n\n')
    (partition,) = ImageList(table, keep_columns=True).partitions(9)
    assert names([partition]) == [["a,1.png"]]
    assert partition.extra_columns is not None
    assert partition.extra_columns["mask"].to_pylist() == ["two\nlines"]


def test_invalid_file_names_are_failures_of_their_row(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    good.write_bytes(png(7))
    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(odd, "wb") as file:
        file.write(png(8))
    (batch,) = image_batches(
        ImageList(tmp_path).partitions(9), ImageDataset(8, Preprocessing()), 9, 0
    )
    assert batch.names == [f"{tmp_path}/caf\\udce9.png", str(good)]
    assert "The file name is not UTF-8" in batch.errors[0]
    assert batch.errors[1] == ""
    table = tmp_path / "a.csv"
    table.write_text(f"img_path\na\0b.png\n{'x' * 300}#3\n{good}\n")
    (batch,) = image_batches(ImageList(table).partitions(9), ImageDataset(8, Preprocessing()), 9, 0)
    assert [bool(error) for error in batch.errors] == [True, True, False]


def test_link_to_ancestor_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    with pytest.raises(UserError, match="own ancestor"):
        list(ImageList(tmp_path).partitions(1))


def test_invalid_list_raises_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Image list or folder not found"):
        ImageList(tmp_path / "none.csv")
    with pytest.raises(UserError, match="No images found"):
        list(ImageList(tmp_path).partitions(1))
    table = tmp_path / "a.csv"
    table.write_text("img_path\n")
    with pytest.raises(UserError, match="The list has no rows"):
        list(ImageList(table).partitions(1))
    table.write_text("path,img_tokens\na.png,1\n")
    with pytest.raises(
        UserError, match=r"Column 'img_path' not found \(columns: path, img_tokens\)"
    ):
        list(ImageList(table).partitions(1))
    with pytest.raises(UserError, match="would be overwritten"):
        list(ImageList(table, "path", keep_columns=True).partitions(1))
    pd.DataFrame({"img_path": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has type int64 \(expected strings"):
        list(ImageList(tmp_path / "a.parquet").partitions(1))
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="Cannot read the table"):
        list(ImageList(tmp_path / "b.parquet").partitions(1))


def test_truncated_or_compressed_tar_raises(tmp_path: Path) -> None:
    members = {f"{i}.png": png(i) for i in range(30)}
    write_tar(tmp_path / "a.tar", members)
    complete = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(complete[: len(complete) // 2 + 100])
    with pytest.raises(UserError, match=r"a\.tar: Cannot read the tar"):
        list(ImageList(tmp_path / "a.tar").partitions(100))
    write_tar(tmp_path / "b.tar", members, "w:gz")
    with pytest.raises(UserError, match=r"b\.tar: Cannot read the tar"):
        list(ImageList(tmp_path / "b.tar").partitions(100))


# --- images in Parquet and Arrow ----------------------------------------------------------------


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROWS = {
    "bytes": (pa.binary(), [png(10), png(20), None]),
    "large": (pa.large_binary(), [png(10), png(20), None]),
    "struct": (
        IMAGE,
        [{"bytes": png(10), "path": None}, {"bytes": png(20), "path": "b.png"}, None],
    ),
    "list": (
        pa.list_(IMAGE),
        [[{"bytes": png(10), "path": None}, {"bytes": png(20), "path": "b.png"}], [], None],
    ),
    "list of bytes": (pa.large_list(pa.binary()), [[png(10)], [png(20), None]]),
}


def write_table(path: Path, column: pa.Array) -> None:
    table = pa.table({"image": column, "label": [f"{i}" for i in range(len(column))]})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    elif path.name == "stream.arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("file", ["a.parquet", "a.arrow", "stream.arrow"])
@pytest.mark.parametrize("layout", list(ROWS))
def test_embedded_images_are_read(tmp_path: Path, file: str, layout: str) -> None:
    kind, rows = ROWS[layout]
    path = tmp_path / file
    write_table(path, pa.array(rows, kind))
    expected = {
        "bytes": [("#0", 10, "0"), ("#1", 20, "1"), ("#2", None, "2")],
        "struct": [("#0", 10, "0"), ("b.png", 20, "1"), ("#2", None, "2")],
        "list": [("#0.0", 10, "0"), ("b.png", 20, "0"), ("#1", None, "1"), ("#2", None, "2")],
        "list of bytes": [("#0.0", 10, "0"), ("#1.0", 20, "1"), ("#1.1", None, "1")],
    }
    expected["large"] = expected["bytes"]
    partitions = list(ImageList(path, "image", keep_columns=True).partitions(2))
    sources = [source for partition in partitions for source in partition.sources]
    labels = [x for p in partitions for x in p.extra_columns["label"].to_pylist()]  # type: ignore[index]
    assert [(s.name.removeprefix(str(path)), x) for s, x in zip(sources, labels, strict=True)] == [
        (name, label) for name, _, label in expected[layout]
    ]
    for source, (_, value, _) in reversed(list(zip(sources, expected[layout], strict=True))):
        if value is None:
            with pytest.raises(ImageError, match="The image has no bytes"):
                source.open()
        else:
            assert np.asarray(source.open()).max() == value


def test_embedded_path_without_bytes_names_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(7))
    rows = [{"bytes": None, "path": f"{tmp_path}/a.png"}, {"bytes": None, "path": "missing.png"}]
    write_table(tmp_path / "t.parquet", pa.array(rows, IMAGE))
    (partition,) = ImageList(tmp_path / "t.parquet", "image").partitions(9)
    assert np.asarray(partition.sources[0].open()).max() == 7
    with pytest.raises(ImageError, match=r"missing\.png: Image not found"):
        partition.sources[1].open()


def test_embedded_stack_has_frames_and_workers_read_it(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), 5).save(
        buffer, "tiff", save_all=True, append_images=[Image.new("L", (4, 4), 250)]
    )
    path = tmp_path / "t.parquet"
    write_table(path, pa.array([png(1), buffer.getvalue(), png(2)], pa.binary()))
    parts = [p.select_frames("all") for p in ImageList(path, "image").partitions(9)]
    dataset = ImageDataset(8, Preprocessing())
    batches = list(image_batches(parts, dataset, 2, num_workers=2))
    assert [n.removeprefix(str(path)) for b in batches for n in b.names] == [
        "#0", "#1#0", "#1#1", "#2"
    ]  # fmt: skip
    assert [int(image.max()) for b in batches for image in b.images] == [1, 5, 250, 2]


def test_paths_of_an_arrow_file_are_read(tmp_path: Path) -> None:
    write_table(tmp_path / "a.arrow", pa.array(["x.png", "y.png", "z.png"]))
    assert names(list(ImageList(tmp_path / "a.arrow", "image").partitions(9))) == [
        ["x.png", "y.png", "z.png"]
    ]


def test_long_shared_values_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(8192, np.int32)), pa.array(["a" * (1 << 20)])
    )
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"image": column}), path, store_schema=False)
    with pytest.raises(UserError, match="has a value of 1048576 characters"):
        list(ImageList(path, "image").partitions(9))
    with pa.ipc.new_file(tmp_path / "bomb.arrow", pa.schema([("image", column.type)])) as writer:
        writer.write_table(pa.table({"image": column}))
    with pytest.raises(UserError, match="has a value of 1048576 characters"):
        list(ImageList(tmp_path / "bomb.arrow", "image").partitions(9))


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_disk", "in_list"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_the_other_normal_form_are_found(
    tmp_path: Path, on_disk: Literal["NFC", "NFD"], in_list: Literal["NFC", "NFD"]
) -> None:
    name = "Schädel é.png"
    (tmp_path / unicodedata.normalize(on_disk, name)).write_bytes(png(9))
    volume = tmp_path / unicodedata.normalize(on_disk, "Bänder.tif")
    first, second = Image.new("L", (4, 4), 5), Image.new("L", (4, 4), 6)
    first.save(volume, save_all=True, append_images=[second])
    listed = [f"{tmp_path}/{unicodedata.normalize(in_list, n)}" for n in (name, "Bänder.tif")]
    (tmp_path / "l.csv").write_text("img_path\n" + "\n".join(listed) + "\n", encoding="utf-8")
    (partition,) = ImageList(tmp_path / "l.csv").partitions(9)
    expanded = partition.select_frames("all")
    assert names([expanded]) == [[listed[0], f"{listed[1]}#0", f"{listed[1]}#1"]]
    assert [np.asarray(source.open()).max() for source in expanded.sources] == [9, 5, 6]
    assert np.asarray(open_image(f"{listed[1]}#1")).max() == 6


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiter_of_a_csv_is_that_of_its_header(tmp_path: Path, delimiter: str) -> None:
    table = tmp_path / "a.csv"
    rows = [["label", "img_path"], ["a,b" if delimiter != "," else "ab", "x y.png"]]
    table.write_text("\n".join(delimiter.join(row) for row in rows) + "\n", encoding="utf-8-sig")
    assert names(list(ImageList(table).partitions(9))) == [["x y.png"]]


def test_one_image_is_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(9))
    assert names(list(ImageList(tmp_path / "a.png").partitions(9))) == [[f"{tmp_path}/a.png"]]


def test_files_of_a_tar_that_are_not_images_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.TAR"
    write_tar(path, {"0.png": png(1), "0.cls": b"3", "0.txt": b"", "1.jp2": b"broken"})
    images = ImageList(tmp_path)
    assert len(next(images.partitions(9)).sources) == 2
    assert images.skipped == {".cls": 1}
