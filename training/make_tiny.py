"""Makes the embedded model `tiny` from nothing: VQGAN, text tokenizer, decoder.

In: nothing but seeds; the data are drawn scans (`medley.phantoms`). Out: a checkpoint in
Chameleon's layout and `training_log.json` with the curves. On 2 cores it takes about an hour:

    python -m training.make_tiny --output build/tiny
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from medley.checkpoints.chameleon import Sizes, write_checklist, write_model
from medley.checkpoints.vqgan_files import (
    HUGGING_FACE_PREFIX,
    read_vqgan,
    to_hugging_face_config,
    write_vqgan,
)
from medley.doctor import SELF_TEST, self_test_values
from medley.document import Picture
from medley.files import whole_file, write_json
from medley.model import ChameleonForConditionalGeneration, decoder_config, tie_head_norms
from medley.options import resolved, run_program
from medley.packing import best_fit, make_row, stack_rows
from medley.phantoms import ALL_MODALITIES, Phantom, documents
from medley.vocabulary import (
    BEGIN_IMAGE,
    BOS,
    END_IMAGE,
    EOS,
    PAD,
    UNK,
    TextTokenizer,
    code_name,
)
from medley.vqgan import VQGAN, VQGANConfig
from medley.vqgan.training import CodebookAverage, training_step

CODES = 8192  # the layout of Chameleon's vocabulary, kept whole
FIRST_TEXT_PIECE = 8712  # words begin behind the last reserved token


@dataclass(frozen=True)
class Options:
    """Makes the embedded model from nothing.

    Args:
        output: folder of the new checkpoint; parts that are there are kept
        seed: seed of data and weights
        vqgan_steps: optimizer steps of the VQGAN
        vqgan_batch: pictures of a step
        vqgan_lr: peak learning rate of the VQGAN
        active_codes: codes of the 8192 that are put to use
        codebook_start: step from which on latents are quantised
        merges: merges of the byte-level BPE
        width: width of the decoder
        layers: layers of the decoder
        heads: heads of the decoder
        context: longest sequence of the decoder
        decoder_steps: optimizer steps of the decoder
        decoder_rows: packed rows of a step
        row_length: tokens of a packed row
        decoder_lr: peak learning rate of the decoder
    """

    output: Path = Path("build/tiny")
    seed: int = 0
    vqgan_steps: int = 3600
    vqgan_batch: int = 16
    vqgan_lr: float = 1e-3
    active_codes: int = 2048
    codebook_start: int = 300
    merges: int = 1000
    width: int = 192
    layers: int = 6
    heads: int = 6
    context: int = 4096
    decoder_steps: int = 1000
    decoder_rows: int = 10
    row_length: int = 384
    decoder_lr: float = 2e-3


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 2 %."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


# --- the VQGAN ----------------------------------------------------------------------------


def vqgan_pictures(rng: np.random.Generator, count: int, size: int) -> Tensor:
    """Phantoms (count, 3, size, size) in [-1, 1]; three in ten with changed grey values,
    mirrored or tinted, so that the codebook also serves pictures of another look.
    """
    pixels = np.empty((count, 3, size, size), np.float32)
    for index in range(count):
        grey = Phantom.random(rng, ALL_MODALITIES).draw(size).astype(np.float32) / 127.5 - 1
        kind = rng.random()
        if kind < 0.3:
            grey = grey * rng.uniform(0.4, 1.0) * rng.choice([-1, 1])
            grey = np.clip(grey + rng.uniform(-0.4, 0.4), -1, 1)
        if kind < 0.15:
            grey = np.roll(grey, rng.integers(-16, 17, 2), (0, 1))[:, :: rng.choice([-1, 1])]
        pixels[index] = grey
        if kind < 0.05:
            tint = rng.uniform(0.5, 1, (3, 1, 1)).astype(np.float32)
            shift = rng.uniform(-0.3, 0.3, (3, 1, 1)).astype(np.float32)
            pixels[index] = np.clip(pixels[index] * tint + shift, -1, 1)
    return torch.from_numpy(pixels)


def train_vqgan(options: Options, log: list[dict[str, float]]) -> VQGAN:
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    vqgan = VQGAN(
        VQGANConfig(
            ch=32, ch_mult=(1, 1, 2, 3), num_res_blocks=1, resolution=64,
            z_channels=32, embed_dim=8, n_embed=CODES,
        )
    )  # fmt: skip
    weights = [p for n, p in vqgan.named_parameters() if not n.startswith("quantize.")]
    optimizer = torch.optim.AdamW(weights, lr=1.0, weight_decay=0, betas=(0.9, 0.99))
    average: CodebookAverage | None = None
    seen: list[Tensor] = []
    for step in range(options.vqgan_steps):
        for group in optimizer.param_groups:
            group["lr"] = options.vqgan_lr * cosine(step, options.vqgan_steps, 100)
        pixels = vqgan_pictures(rng, options.vqgan_batch, vqgan.config.resolution)
        with torch.autocast("cpu", torch.bfloat16):
            result = training_step(vqgan, pixels, average is not None, commitment=0.5)
        optimizer.zero_grad()
        result.loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if average is not None:
            average.update(vqgan, result.latents, result.codes)
        elif step < options.codebook_start:
            seen = [*seen[-7:], result.latents]
        else:
            average = CodebookAverage.start(vqgan, torch.cat(seen), options.active_codes, generator)
        if step % 50 == 0 or step == options.vqgan_steps - 1:
            error = float((result.reconstruction.detach() - pixels).square().mean())
            row = {"step": step, "loss": float(result.loss), "psnr": -10 * math.log10(error / 4)}
            log.append(row)
            print(
                f"vqgan   step {step:5d}  loss {row['loss']:.4f}  PSNR {row['psnr']:.2f} dB",
                flush=True,
            )
    return vqgan.eval()


# --- the text tokenizer -------------------------------------------------------------------

GENERAL_TEXT = """
What is shown in this picture? What abnormality is seen? Is the image normal? Where is the
lesion located? Is there evidence of a fracture, an effusion, an infarct, a hemorrhage or a
tumor? Which lobe, which side, which artery, which plane: axial, coronal or sagittal? Is
contrast used? Please describe this picture. What type of imaging modality was used to acquire
it? The lungs are clear, the heart is enlarged, the aorta is not. The right kidney, the liver,
the spleen, the pancreas, the bowel, the brain and its ventricles are normal. Bilateral pleural
effusions with cardiomegaly and pulmonary edema. Answer the question with yes or no. There is
a mass in the left upper lobe. Is this a T1 weighted or T2 weighted image, or a FLAIR sequence?
""".splitlines()


def phantom_texts(seed: int, scans: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    place = Picture(codes=(0,))
    for _ in range(scans):
        for document in documents(Phantom.random(rng, ALL_MODALITIES), place, rng):
            yield from (p for turn in document.turns for p in turn.parts if isinstance(p, str))


def make_tokenizer(options: Options) -> dict[str, Any]:
    """A byte-level BPE in Chameleon's id layout, as the content of `text_tokenizer.json`."""
    before = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = before
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + options.merges, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([*GENERAL_TEXT, *phantom_texts(options.seed, 2000)], trainer)
    model = json.loads(trained.to_str())["model"]
    names = [BOS, PAD, EOS, UNK, *map(code_name, range(CODES)), END_IMAGE, BEGIN_IMAGE]
    names += [f"<reserved{i - 4:05d}>" for i in range(len(names), FIRST_TEXT_PIECE)]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    table = {name: index for index, name in enumerate([*names, *pieces])}
    whole = Tokenizer(models.BPE(table, [tuple(m) for m in model["merges"]], unk_token=UNK))
    whole.pre_tokenizer = before
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens(names)
    parsed: dict[str, Any] = json.loads(whole.to_str())
    return parsed


# --- the decoder --------------------------------------------------------------------------


def new_decoder(
    options: Options, tokenizer: TextTokenizer, vqgan: VQGAN
) -> ChameleonForConditionalGeneration:
    """A fresh decoder. Codes that look alike start alike: the rows of the image codes begin
    as a random projection of the codebook, which a model this small learns from far sooner.
    """
    vocabulary, sizes = tokenizer.vocabulary, vqgan.config
    torch.manual_seed(options.seed + 1)
    config = decoder_config(
        width=options.width, layers=options.layers, heads=options.heads, key_value_heads=None,
        feed_forward=feed_forward_width(options.width), vocabulary_size=vocabulary.size,
        context=options.context, rope_theta=10_000.0, norm_eps=1e-5, swin_norm=False,
        model_parallel_size=1,
        vq_config=to_hugging_face_config(sizes),
        vocabulary_map=tokenizer.marked.get_vocab(), marks=vocabulary,
    )  # fmt: skip
    decoder = ChameleonForConditionalGeneration(config)
    codebook = vqgan.quantize.embedding.weight.detach()
    codebook = (codebook - codebook.mean(0)) / codebook.std()
    with torch.no_grad():
        for table in (decoder.model.embed_tokens.weight, decoder.lm_head.weight):
            rows = table[vocabulary.image_codes.start : vocabulary.image_codes.stop]
            like = codebook @ torch.randn(codebook.shape[1], options.width)
            rows.mul_(0.4).add_(like / like.std() * config.initializer_range * 0.9)
    return decoder


def feed_forward_width(width: int, multiple_of: int = 256) -> int:
    """Chameleon's rule: two thirds of four times the width, rounded up to `multiple_of`."""
    return -(-int(8 * width / 3) // multiple_of) * multiple_of


@torch.no_grad()
def phantom_sequences(
    tokenizer: TextTokenizer, vqgan: VQGAN, rng: np.random.Generator, scans: int
) -> list[NDArray[np.int64]]:
    """Token sequences of all the documents about `scans` new phantoms."""
    drawn = [Phantom.random(rng) for _ in range(scans)]
    size = vqgan.config.resolution
    grey = torch.from_numpy(np.stack([scan.draw(size) for scan in drawn]))
    pixels = (grey.float() / 255 * 2 - 1)[:, None].expand(-1, 3, -1, -1)
    codes = torch.cat([vqgan.encode(part) for part in pixels.split(64)]).tolist()
    return [
        np.array(document.to_ids(tokenizer), dtype=np.int64)
        for scan, own in zip(drawn, codes, strict=True)
        for document in documents(scan, Picture(codes=tuple(own)), rng)
    ]


def batches(
    options: Options, tokenizer: TextTokenizer, vqgan: VQGAN
) -> Iterator[dict[str, Tensor]]:
    rng = np.random.default_rng(options.seed + 1)
    while True:
        sequences = phantom_sequences(tokenizer, vqgan, rng, scans=512)
        rows = best_fit([len(s) for s in sequences], options.row_length)
        rng.shuffle(rows)
        for start in range(0, len(rows) - options.decoder_rows + 1, options.decoder_rows):
            chosen = rows[start : start + options.decoder_rows]
            packed = [make_row([sequences[i] for i in row], tokenizer.vocabulary) for row in chosen]
            yield stack_rows(packed, tokenizer.vocabulary)


def train_decoder(
    options: Options, tokenizer: TextTokenizer, vqgan: VQGAN, log: list[dict[str, float]]
) -> ChameleonForConditionalGeneration:
    decoder = new_decoder(options, tokenizer, vqgan).train()
    tie_head_norms(decoder)
    weights = [p for n, p in decoder.named_parameters() if ".vqmodel." not in n]
    optimizer = torch.optim.AdamW(weights, lr=1.0, weight_decay=0.01, betas=(0.9, 0.95))
    sums, began = torch.zeros(4, dtype=torch.float64), time.monotonic()
    supply = batches(options, tokenizer, vqgan)
    for step in range(options.decoder_steps):
        for group in optimizer.param_groups:
            group["lr"] = options.decoder_lr * cosine(step, options.decoder_steps, 100)
        with torch.autocast("cpu", torch.bfloat16):
            loss = decoder(**next(supply)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        assert decoder.loss_sums is not None
        sums += decoder.loss_sums
        if (step + 1) % 50 == 0 or step + 1 == options.decoder_steps:
            text, image = (sums[0] / sums[1]).item(), (sums[2] / sums[3]).item()
            log.append({"step": step + 1, "text_loss": text, "image_loss": image})
            left = (time.monotonic() - began) / (step + 1) * (options.decoder_steps - step - 1)
            print(
                f"decoder step {step + 1:5d}  text loss {text:.4f}  image loss {image:.4f}  "
                f"{left / 60:.1f} min left",
                flush=True,
            )
            sums.zero_()
    return decoder.eval()


# --- the whole ----------------------------------------------------------------------------


def save_decoder(options: Options, decoder: ChameleonForConditionalGeneration) -> None:
    config = decoder.config
    sizes = Sizes(
        width=config.hidden_size, layers=config.num_hidden_layers,
        heads=config.num_attention_heads, key_value_heads=config.num_key_value_heads,
        feed_forward=config.intermediate_size, vocabulary=config.vocab_size,
        norm_eps=config.rms_norm_eps, rope_theta=config.rope_parameters["rope_theta"],
        swin_norm=False, context=config.max_position_embeddings, shards=1,
    )  # fmt: skip
    state = {
        name: tensor.detach().to(torch.bfloat16)
        for name, tensor in decoder.state_dict().items()
        if not name.startswith(HUGGING_FACE_PREFIX)
    }
    write_model(options.output / "models" / "tiny", sizes, lambda: iter(state.items()))


def work(options: Options) -> None:
    """Each part is kept as soon as it is made; a second start goes on behind the last one."""
    tokenizer_folder = options.output / "tokenizer"
    log_file = options.output / "training_log.json"
    log: dict[str, Any] = {"options": resolved(options), "vqgan": [], "decoder": []}
    if log_file.exists():
        log |= {k: v for k, v in json.loads(log_file.read_text()).items() if k != "options"}
    if (tokenizer_folder / "vqgan.ckpt").exists():
        vqgan, _ = read_vqgan(tokenizer_folder)
    else:
        vqgan = train_vqgan(options, log["vqgan"])
        write_vqgan(tokenizer_folder, vqgan, "crop")
        write_json(log_file, log)
    tokenizer_file = tokenizer_folder / "text_tokenizer.json"
    if not tokenizer_file.exists():
        with whole_file(tokenizer_file) as temporary:
            temporary.write_text(json.dumps(make_tokenizer(options), ensure_ascii=False))
    if not (options.output / SELF_TEST).exists():  # written last: what is there is whole
        tokenizer = TextTokenizer.from_file(tokenizer_file)
        log["decoder"] = []
        decoder = train_decoder(options, tokenizer, vqgan, log["decoder"])
        save_decoder(options, decoder)
        write_json(log_file, log)
        write_json(options.output / SELF_TEST, self_test_values(options.output))
    write_checklist(tokenizer_folder)
    print(f"{options.output} is whole; copy it to src/medley/tiny to ship it")


def main(argv: list[str] | None = None) -> int:
    return run_program("training.make_tiny", Options, work, argv)


if __name__ == "__main__":
    sys.exit(main())
