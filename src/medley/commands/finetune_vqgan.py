"""Goes on training a VQGAN on one's own pictures.

In: a checkpoint (or a folder with vqgan.yaml and vqgan.ckpt) and an image list. Out: a folder
with `tokenizer/vqgan.yaml` and `tokenizer/vqgan.ckpt` in Chameleon's layout, `log.jsonl`, grids
of originals above reconstructions, and `state.pt`, from which a killed run goes on exactly.

    torchrun --nproc-per-node=2 -m medley finetune-vqgan \
        --input pictures --ckpt tiny --output finetuned --steps 200 --trainable decoder

With `--trainable all` the codes change their meaning: pictures have to be tokenized again, and
a decoder that was trained on the old codes is refused. `--trainable decoder` changes no code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from medley.checkpoints.checkpoint import vqgan_folder
from medley.errors import PartialFailure, UserError
from medley.images.dataloader import ImageDataset, image_batches
from medley.images.preprocess import Fit, bytes_to_pixels
from medley.images.sources import Frames, ImageList, ImageSource, Partition
from medley.inference.loading import local_device
from medley.utils.cli_options import resolved
from medley.utils.distributed import all_ranks, from_main_rank, is_main_rank, rank, world_size
from medley.utils.files import atomic_dir, atomic_file, escape_name
from medley.utils.jsonl import append_jsonl
from medley.utils.malloc import keep_freed_memory
from medley.utils.manifest import read_manifest, write_manifest
from medley.vqgan import VQGAN
from medley.vqgan.files import load_tensors, read_vqgan, write_vqgan
from medley.vqgan.image_tokenizer import ImageTokenizer, token_space_fingerprint
from medley.vqgan.metrics import CodeUsage, comparison, psnr, ssim
from medley.vqgan.perceptual import PerceptualDistance
from medley.vqgan.trainer import Finetuner, FinetuningOptions

GRID = 8  # pictures of a grid
COLLAPSED = 0.1  # of the perplexity at the start


@dataclass(frozen=True)
class FinetuneVqganOptions:
    """Goes on training a VQGAN on one's own pictures.

    Args:
        input: CSV or Parquet file with a column of paths, folder of pictures, or WebDataset tar
        output: folder of the result; one that holds a state of the same run is gone on with
        ckpt: checkpoint whose VQGAN is the start, a folder with one, or tiny
        trainable: all, or decoder, which leaves every code as it is
        steps: optimizer steps
        bs: pictures of one step, for each rank
        lr: learning rate
        val_share: share of the pictures that is kept for measuring
        eval_steps: measure, save and draw a grid every so many steps
        commitment: weight that pulls latents to their codes
        perceptual: VGG16 of torchvision and linear heads of LPIPS, two files, for a perceptual loss
        perceptual_weight: its weight
        discriminator_start: step from which the discriminator counts; none at all if not given
        discriminator_warmup: steps before that in which it learns without counting
        discriminator_weight: its weight
        seed: order of the pictures, and the discriminator's start
        image_key: column of the paths
        n_limit: use only so many rows of the input
        frames: of files with several (DICOM, NIfTI, TIFF), the first, the middle one or all
        num_workers: processes that read pictures, for each rank
        device: auto, cpu, cuda or mps
        allow_errors: end with status 0 even when pictures could not be read
    """

    input: Path
    output: Path
    ckpt: str
    trainable: Literal["all", "decoder"] = "all"
    steps: int = 1000
    bs: int = 4
    lr: float = 5e-5
    val_share: float = 0.1
    eval_steps: int = 100
    commitment: float = 0.25
    perceptual: list[Path] | None = None
    perceptual_weight: float = 1.0
    discriminator_start: int | None = None
    discriminator_warmup: int = 500
    discriminator_weight: float = 0.8
    seed: int = 0
    image_key: str = "img_path"
    n_limit: int | None = None
    frames: Frames | None = None
    num_workers: int = 0
    device: str = "auto"
    allow_errors: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "bs", "eval_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, expected 1 or more")
        if not 0 < self.val_share < 1:
            raise UserError(f"--val_share is {self.val_share}, expected between 0 and 1")
        if self.perceptual is not None and len(self.perceptual) != 2:
            raise UserError("--perceptual wants two files: VGG16's weights, and LPIPS's heads")

    def finetuning(self) -> FinetuningOptions:
        counts_from = self.steps if self.discriminator_start is None else self.discriminator_start
        learns = self.discriminator_start is not None
        return FinetuningOptions(
            lr=self.lr,
            decoder_only=self.trainable == "decoder",
            commitment=self.commitment,
            perceptual_weight=self.perceptual_weight,
            discriminator_weight=self.discriminator_weight,
            discriminator_from=counts_from - self.discriminator_warmup if learns else self.steps,
            discriminator_counts_from=counts_from,
        )


def finetune_vqgan(options: FinetuneVqganOptions) -> None:
    keep_freed_memory()
    device = local_device(options.device)
    vqgan, fit = open_vqgan(options.ckpt)
    before = token_space_fingerprint(vqgan)
    perceptual = None
    if options.perceptual is not None:
        perceptual = PerceptualDistance.from_files(*options.perceptual).to(device)
    tuner = Finetuner(vqgan, options.finetuning(), perceptual, device, options.seed)
    squares = ImageDataset(vqgan.config.resolution, fit)
    with all_ranks():
        good, failed = readable(options, squares)
        held_out = max(1, round(len(good) * options.val_share))
        if len(good) <= held_out:
            raise UserError(f"{options.input}: {len(good)} readable pictures, 2 are the least")
        order = torch.randperm(len(good), generator=torch.Generator().manual_seed(options.seed))
        chosen = [good[i] for i in order.tolist()]
        run = what_is_run(options, good, before)
        from_main_rank(lambda: start(options, run, fit))
        resume(options, tuner)
        train(options, tuner, squares, chosen[held_out:], chosen[:held_out])
        from_main_rank(lambda: finish(options, tuner.vqgan, fit, before, run, failed))


def open_vqgan(ckpt: str) -> tuple[VQGAN, Fit]:
    folder = vqgan_folder(Path(ckpt))
    if folder is not None:
        return read_vqgan(folder)
    tokenizer = ImageTokenizer.from_checkpoint(ckpt)
    tokenizer.require_decoder()
    fresh = VQGAN(tokenizer.vqgan.config)
    fresh.load_state_dict(tokenizer.vqgan.state_dict())
    return fresh, tokenizer.fit


def readable(options: FinetuneVqganOptions, squares: ImageDataset) -> tuple[list[ImageSource], int]:
    """The pictures that can be read, and how many cannot; each rank tries its share."""
    listed = ImageList(options.input, options.image_key, limit=options.n_limit)
    sources = [s for p in listed.parts(1000) for s in p.with_frames(options.frames).sources]
    own = Partition(0, sources[rank() :: world_size()], None)
    errors: list[str] = []
    progress = tqdm(total=len(own.sources), desc="reading", disable=not is_main_rank())
    for batch in image_batches([own] if own.sources else [], squares, 64, options.num_workers):
        errors += batch.errors
        progress.update(len(batch.errors))
    progress.close()
    gathered: list[list[str]] = [errors]
    if dist.is_initialized():
        gathered = [[] for _ in range(world_size())]
        dist.all_gather_object(gathered, errors)
    by_place = {
        r + i * world_size(): e for r, own in enumerate(gathered) for i, e in enumerate(own)
    }
    bad = [(escape_name(sources[i].name), e) for i, e in sorted(by_place.items()) if e]
    if is_main_rank():
        options.output.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"img_path": n, "error": e}, ensure_ascii=False) for n, e in bad]
        (options.output / "errors.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return [source for i, source in enumerate(sources) if not by_place[i]], len(bad)


def what_is_run(
    options: FinetuneVqganOptions, good: list[ImageSource], before: str
) -> dict[str, Any]:
    """What must be the same when a run goes on; steps and learning rate may change."""
    digest = hashlib.sha256("\n".join(source.name for source in good).encode())
    same = (
        "trainable", "bs", "seed", "val_share", "commitment", "perceptual_weight",
        "discriminator_start", "discriminator_warmup", "discriminator_weight",
    )  # fmt: skip
    chosen = {name: getattr(options, name) for name in same}
    perceptual = None if options.perceptual is None else list(map(str, options.perceptual))
    return {
        "pictures": len(good), "names": digest.hexdigest(), "ranks": world_size(),
        "token_space_before": before, "perceptual": perceptual, **chosen,
    }  # fmt: skip


def start(options: FinetuneVqganOptions, run: dict[str, Any], fit: Fit) -> None:
    manifest = read_manifest(options.output)
    if manifest.get("token_space") is not None:
        raise UserError(f"{options.output}: holds a finished VQGAN; name another --output")
    before = manifest.get("run") or run
    for name, value in run.items():
        if before.get(name) != value:
            raise UserError(
                f"{options.output}: holds a run with {name} {before.get(name)!r}, this one has "
                f"{value!r}; name another --output, or go on with the same"
            )
    shutil.rmtree(options.output / "tokenizer", ignore_errors=True)  # of a kill at the very end
    inputs = [options.input]
    write_manifest(options.output, resolved(options), inputs, None, fit=fit, run=run)


def resume(options: FinetuneVqganOptions, tuner: Finetuner) -> None:
    state = options.output / "state.pt"
    if state.exists():
        tuner.load(load_tensors(state))
        if is_main_rank():
            print(f"going on after step {tuner.step}")


def train(
    options: FinetuneVqganOptions,
    tuner: Finetuner,
    squares: ImageDataset,
    training: list[ImageSource],
    held_out: list[ImageSource],
) -> None:
    device = next(tuner.vqgan.parameters()).device
    usage, first = CodeUsage(tuner.vqgan.config.n_embed), tuner.step
    if first == 0:
        measure(options, tuner, squares, held_out, {})
    batches = endless(options, squares, training, first)
    with tqdm(
        total=options.steps, initial=first, desc="training", disable=not is_main_rank()
    ) as progress:
        while tuner.step < options.steps:
            seed = options.seed + 1_000_003 * (tuner.step * world_size() + rank() + 1)
            losses, codes = tuner.train_on(bytes_to_pixels(next(batches).to(device)), seed)
            if not torch.isfinite(torch.tensor(losses["loss"])):
                raise UserError(
                    f"the loss is {losses['loss']} at step {tuner.step}: lower --lr; "
                    f"{options.output} keeps the state before it"
                )
            usage.add(codes)
            progress.update()
            if tuner.step % options.eval_steps == 0 or tuner.step == options.steps:
                measure(options, tuner, squares, held_out, {**losses, **usage.summary()})
                usage = CodeUsage(len(usage.counts))


def endless(
    options: FinetuneVqganOptions, squares: ImageDataset, training: list[ImageSource], first: int
) -> Iterator[Tensor]:
    """This rank's squares of step `first` and of every later one: a new order each epoch."""
    together = options.bs * world_size()

    def parts() -> Iterator[Partition]:
        for step in range(first, options.steps):
            places = range(step * together, (step + 1) * together)
            own = places[rank() * options.bs : (rank() + 1) * options.bs]
            yield Partition(step, [training[shuffled(i)] for i in own], None)

    cached: dict[int, list[int]] = {}

    def shuffled(place: int) -> int:
        epoch, within = divmod(place, len(training))
        if epoch not in cached:
            generator = torch.Generator().manual_seed(options.seed * 7919 + epoch)
            cached[epoch] = torch.randperm(len(training), generator=generator).tolist()
            cached.pop(epoch - 2, None)
        return cached[epoch][within]

    for batch in image_batches(parts(), squares, options.bs, options.num_workers):
        if any(batch.errors):
            raise UserError(f"{next(e for e in batch.errors if e)}: it could be read before")
        yield batch.squares


@torch.no_grad()
def measure(
    options: FinetuneVqganOptions,
    tuner: Finetuner,
    squares: ImageDataset,
    held_out: list[ImageSource],
    losses: dict[str, float],
) -> None:
    """Measures on the pictures held out, writes log, grid and state; stops at a collapse."""

    def on_main_rank() -> None:
        device = next(tuner.vqgan.parameters()).device
        usage = CodeUsage(tuner.vqgan.config.n_embed)
        decibels, likeness = [], []
        grid: list[tuple[Tensor, Tensor]] = []
        tuner.vqgan.eval()
        for batch in image_batches([Partition(0, held_out, None)], squares, options.bs, 0):
            pixels = bytes_to_pixels(batch.squares.to(device))
            codes = tuner.vqgan.encode(pixels)
            drawn = tuner.vqgan.decode(codes)
            usage.add(codes)
            decibels.append(psnr(pixels, drawn))
            likeness.append(ssim(pixels, drawn))
            grid += list(zip(pixels, drawn, strict=True))[: GRID - len(grid)]
        tuner.vqgan.train()
        entry = {
            "step": tuner.step,
            "val_psnr": float(torch.cat(decibels).mean()),
            "val_ssim": float(torch.cat(likeness).mean()),
            **{f"val_{name}": value for name, value in usage.summary().items()},
            **losses,
        }
        append_jsonl(options.output / "log.jsonl", entry)
        with atomic_file(options.output / "grids" / f"step_{tuner.step:06}.png") as temporary:
            comparison(grid).save(temporary, "png")
        tqdm.write(
            f"step {tuner.step}: PSNR {entry['val_psnr']:.2f} dB, SSIM {entry['val_ssim']:.3f}, "
            f"perplexity {usage.perplexity:.0f}, {usage.used} of {len(usage.counts)} codes used"
        )
        first = json.loads((options.output / "log.jsonl").read_text().splitlines()[0])
        if usage.perplexity < COLLAPSED * first["val_perplexity"]:
            raise UserError(
                f"the codebook collapsed: perplexity {first['val_perplexity']:.0f} at the start, "
                f"{usage.perplexity:.1f} at step {tuner.step}; lower --lr, raise --commitment, "
                "or train the decoder only. The state before it is kept"
            )
        with atomic_file(options.output / "state.pt") as temporary:
            torch.save(tuner.state(), temporary)

    from_main_rank(on_main_rank)


def finish(
    options: FinetuneVqganOptions,
    vqgan: VQGAN,
    fit: Fit,
    before: str,
    run: dict[str, Any],
    failed: int,
) -> None:
    with atomic_dir(options.output / "tokenizer") as folder:
        write_vqgan(folder, vqgan, fit)
        source = vqgan_folder(Path(options.ckpt))
        if source is not None and (source / "text_tokenizer.json").is_file():
            shutil.copy(source / "text_tokenizer.json", folder)
    after = token_space_fingerprint(vqgan)
    write_manifest(options.output, resolved(options), [options.input], after, fit=fit, run=run)
    print(f"wrote {options.output / 'tokenizer'}")
    if after == before:
        print("The token space is the same: use it with --vqgan beside the old decoder.")
    else:
        print(
            f"ANOTHER TOKEN SPACE: the codes have changed their meaning ({before[:12]} is now "
            f"{after[:12]}).\nTokenize every picture again, and train the decoder on the new "
            "codes; one that was trained on the old codes is refused with this VQGAN."
        )
    if failed and not options.allow_errors:
        raise PartialFailure(
            f"{failed} pictures could not be read; {options.output / 'errors.jsonl'} names them "
            "(--allow_errors accepts that)"
        )
