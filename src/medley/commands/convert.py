"""Converts a dataset to documents, documents to a dataset, or one dataset format to another.

    medley convert --from vqa_rad --input FOLDER --output data
    medley convert --from llava --input mix.json --output mix.jsonl --image_folder images
    medley convert --from image_folder --input scans --output data --test_fraction 0.2
    medley convert --from documents --to sharegpt --input docs.jsonl --output out.json

An --output with a suffix is a single file. Any other --output is a folder with one file for each
published split, or with `train`, `val` and `test` files without a common image or patient
(--test_fraction, --val_fraction). The folder also has `images.csv`, the list of the images.

Bad records are listed and counted, and nothing is written. With --on_error skip, the valid records
are written, and the bad ones go to `bad.jsonl` in the folder or `OUTPUT.bad.jsonl`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from tqdm import tqdm

from medley.datasets.base import ConversionConfig, ConversionOptions
from medley.datasets.convert import (
    Conversion,
    compare_with_published,
    read_sidecars,
    write_image_list,
)
from medley.datasets.output_files import IMAGE_LIST, open_output_files
from medley.datasets.registry import FORMATS, FormatName, make_config
from medley.datasets.samples import ImageCheck
from medley.datasets.splits import describe_leaks, plan_split, select_records
from medley.errors import PartialFailure, UserError
from medley.utils.cli_options import Alias, resolved
from medley.utils.files import atomic_file
from medley.utils.manifest import write_manifest


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(ConversionOptions):
    """Converts a dataset.

    Args:
        source: format of the input
        target: format of the output
        input: file, or folder of the published dataset
        output: file (a name with a suffix), or folder with one file per split
        test_fraction: fraction of the images for a random test split, in place of published splits;
            the images of a patient stay together
        val_fraction: fraction of the images for a random validation split, with --test_fraction
        limit: maximum number of records to write; the first ones unless --balanced
        balanced: select the --limit records evenly over domains
        balance_by: field with the domain of a record; domain, organ or modality unless given
        seed: seed of the balanced selection
        validate_images: check that images exist, have a valid header, or can be decoded (full)
        on_error: fail if there are bad records, or skip them and list them in a file
        max_errors: maximum number of bad records to print
        stats: print counts by domain, question type and answer length
        check_leaks: compare the image contents of the splits
        image_list: CSV file for the list of the images
    """

    source: FormatName
    target: FormatName = "documents"
    input: Path
    output: Path
    test_fraction: float | None = None
    val_fraction: float | None = None
    limit: int | None = None
    balanced: bool = False
    balance_by: str | None = None
    seed: int = 0
    validate_images: ImageCheck = "header"
    on_error: Literal["fail", "skip"] = "fail"
    max_errors: int = 20
    stats: bool = False
    check_leaks: bool = True
    image_list: Path | None = None

    spelling: ClassVar = {"source": "from", "target": "to"}  # `from` is a reserved word in Python
    aliases: ClassVar = {
        "source": Alias("from"),
        "target": Alias("to"),
        "test_share": Alias("test_fraction"),
        "max_samples": Alias("limit"),
        "balance": Alias("balanced"),
        "balance_key": Alias("balance_by"),
        "check": Alias("validate_images", values={"whole": "full"}),
        "skip_bad": Alias("on_error", when_set="skip", when_unset="fail"),
        "leaks": Alias("check_leaks"),
        "pictures": Alias("image_list"),  # alias
    }

    def __post_init__(self) -> None:
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise UserError(
                f"--test_fraction is invalid (got {self.test_fraction}, expected above 0 and below "
                "1)."
            )
        if self.val_fraction is not None and (
            self.test_fraction is None or not 0 < self.val_fraction < 1 - self.test_fraction
        ):
            raise UserError(
                f"--val_fraction is invalid (got {self.val_fraction} with --test_fraction "
                f"{self.test_fraction}, expected above 0, and a sum below 1)."
            )
        if self.test_fraction is not None and self.output.suffix:
            raise UserError(
                f"--test_fraction writes several files, and --output {self.output} is a file name. "
                "Name a folder."
            )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit is invalid (got {self.limit}, expected 1 or more).")
        if self.seed < 0:
            raise UserError(f"--seed is invalid (got {self.seed}, expected 0 or more).")
        if self.balanced and self.limit is None:
            raise UserError("--balanced requires --limit.")
        if FORMATS[self.target].write is None:
            raise UserError(
                f"--to {self.target}: The format is read-only. Use documents or llava, which can "
                "represent all of its records."
            )

    def config(self) -> ConversionConfig:
        return make_config(self.source, self.input, self)


def convert(options: ConvertOptions) -> None:
    source, config = FORMATS[options.source], options.config()
    sidecars = read_sidecars(options.target, options.output, config)
    plan = plan_split(
        source, config, options.validate_images, options.test_fraction,
        options.limit if options.balanced else None, options.balance_by, options.seed,
        options.val_fraction or 0.0,
    )  # fmt: skip
    with open_output_files(options.output, options.max_errors) as files:
        conversion = Conversion(options.target, config, files, options.image_list is not None)
        selected = select_records(
            source, config, options.validate_images, conversion.stats, files.reject, plan
        )
        for item in tqdm(selected, unit=" records", desc="converting"):
            conversion.add(item)
            if plan.selected is None and conversion.stats.counts["written"] == options.limit:
                break
        conversion.check(options.on_error == "skip", options.max_errors)
        images = conversion.split_images()
        expected = 2 + (options.val_fraction is not None)
        if options.test_fraction is not None and len(images) < expected:
            raise UserError(
                f"--test_fraction {options.test_fraction}: The split left one side empty (got "
                f"{', '.join(images)}). The dataset has too few distinct images, texts or patients."
            )
        if files.temporary_folder is not None:
            write_image_list(files.temporary_folder / IMAGE_LIST, images)
        leaks = describe_leaks(images) if len(images) > 1 and options.check_leaks else []
        leaks += conversion.patient_leaks()
        if plan.patients:
            leaks.append(f"the images of each of {plan.patients} patients are in one split")
    conversion.write_sidecars(sidecars)
    if options.image_list is not None:
        with atomic_file(options.image_list) as temporary:
            write_image_list(temporary, images)
    write_convert_manifest(options, conversion, leaks)
    print_summary(options, conversion, leaks)
    if truncated := conversion.stats.counts["truncated files"]:
        raise PartialFailure(
            f"{truncated} files are truncated. Records after the damaged position were not "
            "converted."
        )


def write_convert_manifest(
    options: ConvertOptions, conversion: Conversion, leaks: list[str]
) -> None:
    write_manifest(
        options.output, resolved(options), [Path(f) for f in sorted(conversion.input_files)], None,
        counts=dict(conversion.stats.counts), remarks=dict(conversion.stats.remarks),
        unread_keys=dict(conversion.stats.unread_keys), splits=conversion.split_hashes(),
        statistics=conversion.dataset_stats.tables(), leaks=leaks,
    )  # fmt: skip


def print_summary(options: ConvertOptions, conversion: Conversion, leaks: list[str]) -> None:
    published: dict[str, str] = {}
    if options.test_fraction is None and options.limit is None:
        published = compare_with_published(options.source, conversion.split_hashes())
    lines = conversion.summary(published, leaks)
    lines += conversion.statistics_lines() if options.stats else []
    print("\n".join(lines))
