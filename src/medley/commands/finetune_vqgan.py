"""Fine-tunes a VQGAN on your images.

Input: a checkpoint (or a folder with vqgan.yaml and vqgan.ckpt) and an image list. Output: a
folder with `tokenizer/vqgan.yaml` and `tokenizer/vqgan.ckpt` in Chameleon's layout, `log.jsonl`,
grids of originals above reconstructions, `errors.jsonl`, and `state.pt`. The same command resumes
an interrupted run from `state.pt` with identical weights.

    torchrun --nproc-per-node=2 -m medley finetune-vqgan \
        --input images --ckpt tiny --output finetuned --steps 200 --trainable decoder

`--trainable all` changes the meaning of the image codes: tokenize the images again. A decoder that
was trained on the old codes is refused. `--trainable decoder` changes no image code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from medley.errors import PartialFailure, UserError
from medley.images.dataloader import ImageDataset, image_batches
from medley.images.folders import describe_skipped
from medley.images.formats import Frames
from medley.images.image_source import ImageSource
from medley.images.preprocess import Preprocessing, uint8_to_pixels
from medley.images.sources import ImageList, Partition
from medley.inference.devices import local_device
from medley.utils.cli_options import Alias, resolved
from medley.utils.distributed import from_main_rank, is_main_rank, process_group, rank, world_size
from medley.utils.extras import require_extra
from medley.utils.files import atomic_dir, atomic_file
from medley.utils.jsonl import append_jsonl, json_lines, write_jsonl
from medley.utils.malloc import keep_freed_memory
from medley.utils.manifest import read_manifest, write_manifest
from medley.utils.run_identity import run_identity
from medley.utils.tensor_files import load_pickle
from medley.vqgan import VQGAN
from medley.vqgan.files import open_vqgan, vqgan_folder, write_vqgan
from medley.vqgan.finetuning_run import (
    check_resumed,
    recorded_identity,
    remove_incomplete_result,
    weights_hash,
)
from medley.vqgan.image_tokenizer import token_space_fingerprint
from medley.vqgan.metrics import CodeUsage, comparison_grid
from medley.vqgan.perceptual import PerceptualDistance
from medley.vqgan.reconstruction import validate
from medley.vqgan.trainer import Finetuner, FinetuningOptions
from medley.vqgan.training_data import hold_out, split_unreadable, training_batches

GRID = 8  # images in a grid
COLLAPSED = 0.1  # of the perplexity at the start
# Options that may change when a run is resumed. The images are compared by their names.
NOT_IDENTITY = (
    "input", "output", "ckpt", "steps", "eval_steps", "image_key", "limit", "frames",
    "num_workers", "device", "on_error", "resume_anyway",
)  # fmt: skip


@dataclass(frozen=True)
class FinetuneVqganOptions:
    """Fine-tunes a VQGAN on your images.

    Args:
        input: CSV or Parquet file with a column of paths, folder of images, or WebDataset tar
        output: folder of the result; an interrupted run in it is resumed
        ckpt: checkpoint with the VQGAN to start from, folder with a VQGAN, or tiny
        trainable: all, or decoder, which changes no image code
        steps: optimizer steps
        bs: images in a step, for each rank
        lr: learning rate
        val_fraction: fraction of the images that is held out for validation
        eval_steps: validate, save and write a grid after every N steps
        commitment_weight: weight of the loss that pulls latents to their codebook vectors
        lpips_weights: two files, torchvision's VGG16 and the linear heads of LPIPS, for a
            perceptual loss
        perceptual_weight: weight of the perceptual loss
        discriminator_start: step from which the loss contains the discriminator; no discriminator
            if not given
        discriminator_warmup: steps before discriminator_start that train the discriminator alone
        discriminator_weight: weight of the adversarial loss
        seed: seed of the image order and of the discriminator's weights
        image_key: column of the paths
        limit: use only the first N rows of the input
        frames: for files with several frames (DICOM, NIfTI, TIFF), first, middle or all
        exif_orientation: rotate photographs as their EXIF tag specifies, in this run and with its
            result; by default yes, but with --trainable decoder as the checkpoint specifies
        num_workers: processes that read images, for each rank
        device: auto, cpu, cuda or mps
        on_error: exit status if images cannot be read, fail (3) or skip (0)
        resume_anyway: fields in which a resumed run may differ from its beginning, lr for instance
    """

    aliases: ClassVar[dict[str, Alias]] = {
        "perceptual": Alias("lpips_weights"),
        "commitment": Alias("commitment_weight"),
        "val_share": Alias("val_fraction"),
        "n_limit": Alias("limit"),
        "allow_errors": Alias("on_error", when_set="skip", when_unset="fail"),
    }

    input: Path
    output: Path
    ckpt: str
    trainable: Literal["all", "decoder"] = "all"
    steps: int = 1000
    bs: int = 4
    lr: float = 5e-5
    val_fraction: float = 0.1
    eval_steps: int = 100
    commitment_weight: float = 0.25
    lpips_weights: list[Path] | None = None
    perceptual_weight: float = 1.0
    discriminator_start: int | None = None
    discriminator_warmup: int = 500
    discriminator_weight: float = 0.8
    seed: int = 0
    image_key: str = "img_path"
    limit: int | None = None
    frames: Frames | None = None
    exif_orientation: bool | None = None
    num_workers: int = 0
    device: str = "auto"
    on_error: Literal["fail", "skip"] = "fail"
    resume_anyway: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "bs", "eval_steps"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name}: Out of range (got {getattr(self, name)}, expected 1 or more)."
                )
        if not 0 < self.val_fraction < 1:
            raise UserError(
                f"--val_fraction: Out of range (got {self.val_fraction}, expected between 0 and 1)."
            )
        if self.lpips_weights is not None and len(self.lpips_weights) != 2:
            raise UserError(
                f"--lpips_weights: Wrong number of files (got {len(self.lpips_weights)}, expected "
                "2: the weights of VGG16 and the heads of LPIPS)."
            )

    def finetuning(self) -> FinetuningOptions:
        start = self.discriminator_start
        return FinetuningOptions(
            lr=self.lr,
            decoder_only=self.trainable == "decoder",
            commitment_weight=self.commitment_weight,
            perceptual_weight=self.perceptual_weight,
            discriminator_weight=self.discriminator_weight,
            discriminator_from=self.steps if start is None else start - self.discriminator_warmup,
            adversarial_from=self.steps if start is None else start,
        )


def finetune_vqgan(options: FinetuneVqganOptions) -> None:
    require_extra("torchmetrics", "evaluate", "finetune-vqgan")
    keep_freed_memory()
    device = local_device(options.device)
    vqgan, original = open_complete_vqgan(options.ckpt)
    preprocessing = choose_preprocessing(options, original)
    fingerprint = token_space_fingerprint(vqgan)
    perceptual = None
    if options.lpips_weights is not None:
        perceptual = PerceptualDistance.from_files(*options.lpips_weights).to(device)
    tuner = Finetuner(vqgan, options.finetuning(), perceptual, device, options.seed)
    dataset = ImageDataset(vqgan.config.resolution, preprocessing)
    with process_group(device):
        listed = ImageList(options.input, options.image_key, limit=options.limit)
        parts = (part.select_frames(options.frames) for part in listed.partitions(1000))
        sources = [source for part in parts for source in part.sources]
        if listed.skipped and is_main_rank():
            print(f"{options.input}: {describe_skipped(listed.skipped)}")
        readable, failed = split_unreadable(sources, dataset, options.num_workers)
        training, held_out = hold_out(
            readable, options.val_fraction, options.seed, str(options.input)
        )
        weights = weights_hash(vqgan)
        identity = identify_run(options, readable, fingerprint, preprocessing, weights)
        from_main_rank(lambda: start_run(options, identity, preprocessing))
        if is_main_rank():
            rows = ({"img_path": name, "error": error} for name, error in failed)
            write_jsonl(options.output / "errors.jsonl", rows)
        load_state(options, tuner)
        train(options, tuner, dataset, training, held_out)
        from_main_rank(
            lambda: finish(options, tuner.vqgan, preprocessing, fingerprint, identity, len(failed))
        )


def choose_preprocessing(options: FinetuneVqganOptions, original: Preprocessing) -> Preprocessing:
    """The preprocessing of the result: new codes obey EXIF, a new decoder of old codes does not."""
    exif_orientation = options.exif_orientation
    if exif_orientation is None:
        exif_orientation = original.exif_orientation or options.trainable == "all"
    if options.trainable == "decoder" and exif_orientation != original.exif_orientation:
        raise UserError(
            f"--exif_orientation: Other than that of {options.ckpt} (got {exif_orientation}, "
            f"expected {original.exif_orientation}). --trainable decoder keeps the image codes, "
            "so leave the option out."
        )
    return Preprocessing(original.fit, exif_orientation)


def open_complete_vqgan(ckpt: str) -> tuple[VQGAN, Preprocessing]:
    vqgan, preprocessing, has_decoder = open_vqgan(ckpt)
    if not has_decoder:
        raise UserError(
            f"{ckpt}: This checkpoint has no VQGAN decoder. Name a folder that contains vqgan.yaml "
            "and vqgan.ckpt with --ckpt."
        )
    return vqgan, preprocessing


def identify_run(
    options: FinetuneVqganOptions,
    images: list[ImageSource],
    fingerprint: str,
    preprocessing: Preprocessing,
    weights: str | None = None,
) -> dict[str, Any]:
    """What the result depends on; `weights` is a hash of the VQGAN to start from."""
    names = "\n".join(source.name for source in images)
    return run_identity(options, NOT_IDENTITY) | {
        "exif_orientation": preprocessing.exif_orientation,
        "images": len(images),
        "image_names_hash": hashlib.sha256(names.encode()).hexdigest(),
        "ranks": world_size(),
        "token_space_before": fingerprint,
        "vqgan": weights,
    }


def start_run(
    options: FinetuneVqganOptions, identity: dict[str, Any], preprocessing: Preprocessing
) -> None:
    """Records the run, or compares it with the one in the folder that it is to continue.

    Raises UserError for a folder that contains anything but such a run.
    """
    manifest = read_manifest(options.output)
    recorded = recorded_identity(manifest)
    if not recorded:
        found = [f for f in sorted(options.output.glob("*")) if not f.name.startswith(".")]
        if found:
            names = ", ".join(f.name for f in found[:4]) + (", ..." if len(found) > 4 else "")
            raise UserError(
                f"{options.output}: Is not empty and has no manifest.json of a fine-tuning run "
                f"(contains {names}). Name a new folder with --output."
            )
    elif manifest.get("token_space") is not None:
        raise UserError(
            f"{options.output}: Contains a finished VQGAN. Name another folder with --output."
        )
    else:
        check_resumed(options.output, recorded, identity, options.resume_anyway or ())
        remove_incomplete_result(options.output / "tokenizer")
    inputs = [options.input]
    options.output.mkdir(parents=True, exist_ok=True)
    write_manifest(
        options.output, resolved(options), inputs, None, **preprocessing.describe(), run=identity
    )


def load_state(options: FinetuneVqganOptions, tuner: Finetuner) -> None:
    state = options.output / "state.pt"
    if state.exists():
        tuner.load(load_pickle(state))
        if is_main_rank():
            print(f"resuming after step {tuner.step}")


def train(
    options: FinetuneVqganOptions,
    tuner: Finetuner,
    dataset: ImageDataset,
    training: list[ImageSource],
    held_out: list[ImageSource],
) -> None:
    usage, first = CodeUsage(tuner.vqgan.config.n_embed), tuner.step
    if first == 0:
        save_and_validate(options, tuner, dataset, held_out, {})
    steps = range(first, options.steps)
    batches: Iterator[Tensor] = training_batches(
        training, dataset, steps, options.bs, options.seed, options.num_workers
    )
    with tqdm(
        total=options.steps, initial=first, desc="training", disable=not is_main_rank()
    ) as progress:
        while tuner.step < options.steps:
            seed = options.seed + 1_000_003 * (tuner.step * world_size() + rank() + 1)
            pixels = uint8_to_pixels(next(batches).to(tuner.device))
            losses, codes = tuner.train_step(pixels, seed)
            if not torch.isfinite(torch.tensor(losses["loss"])):
                raise UserError(
                    f"The loss is {losses['loss']} at step {tuner.step}. Lower --lr. "
                    f"{options.output} contains the last saved state."
                )
            usage.add(codes)
            progress.update()
            if tuner.step % options.eval_steps == 0 or tuner.step == options.steps:
                metrics = {**losses, **usage.summary()}
                save_and_validate(options, tuner, dataset, held_out, metrics)
                usage = CodeUsage(len(usage.counts))


def save_and_validate(
    options: FinetuneVqganOptions,
    tuner: Finetuner,
    dataset: ImageDataset,
    held_out: list[ImageSource],
    training_metrics: dict[str, float],
) -> None:
    """Validates on rank 0, then writes log, grid and state. Stops if the codebook collapsed."""

    def on_main_rank() -> None:
        batches = image_batches([Partition(0, held_out, None)], dataset, options.bs, 0)
        found = validate(tuner.vqgan, batches, tuner.device, GRID)
        usage, log = found.usage, options.output / "log.jsonl"
        entry = {
            "step": tuner.step,
            "val_psnr": found.psnr,
            "val_ssim": found.ssim,
            **{f"val_{name}": value for name, value in usage.summary().items()},
            **training_metrics,
        }
        append_jsonl(log, entry)
        with atomic_file(options.output / "grids" / f"step_{tuner.step:06}.png") as temporary:
            comparison_grid(found.examples).save(temporary, "png")
        tqdm.write(
            f"step {tuner.step}: PSNR {found.psnr:.2f} dB, SSIM {found.ssim:.3f}, "
            f"perplexity {usage.perplexity:.0f}, {usage.used} of {len(usage.counts)} codes used"
        )
        first_line = next(json_lines(log))[1]
        at_start = json.loads(first_line)["val_perplexity"]
        if usage.perplexity < COLLAPSED * at_start:
            raise UserError(
                f"The codebook collapsed: perplexity fell from {at_start:.0f} at the start to "
                f"{usage.perplexity:.1f} at step {tuner.step}. Lower --lr, raise "
                "--commitment_weight, or use --trainable decoder. The last saved state is kept."
            )
        with atomic_file(options.output / "state.pt") as temporary:
            torch.save(tuner.state(), temporary)

    from_main_rank(on_main_rank)


def finish(
    options: FinetuneVqganOptions,
    vqgan: VQGAN,
    preprocessing: Preprocessing,
    before: str,
    identity: dict[str, Any],
    failed: int,
) -> None:
    with atomic_dir(options.output / "tokenizer") as folder:
        write_vqgan(folder, vqgan, preprocessing)
        source = vqgan_folder(options.ckpt)
        if source is not None and (source / "text_tokenizer.json").is_file():
            shutil.copy(source / "text_tokenizer.json", folder)
    after = token_space_fingerprint(vqgan)
    inputs = [options.input]
    write_manifest(
        options.output, resolved(options), inputs, after, **preprocessing.describe(), run=identity
    )
    print(f"wrote {options.output / 'tokenizer'}")
    if after == before:
        print("The token space is unchanged. Use the VQGAN with --vqgan and the old decoder.")
    else:
        print(
            f"NEW TOKEN SPACE: the image codes changed their meaning ({before[:12]} -> "
            f"{after[:12]}).\nTokenize all images again and train the decoder on the new codes. "
            "A decoder trained on the old codes is refused with this VQGAN."
        )
    if failed and options.on_error == "fail":
        raise PartialFailure(
            f"{options.output / 'errors.jsonl'}: {failed} images could not be read. Use --on_error "
            "skip to accept this."
        )
