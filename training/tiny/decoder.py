"""The embedded decoder, trained on documents about phantoms."""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medley.data.document import Document, ImagePart
from medley.data.packing import IGNORE_INDEX, build_sequence, collate
from medley.data.vocabulary import TextTokenizer
from medley.errors import UserError
from medley.modeling.attention import set_attention
from medley.modeling.chameleon import (
    ChameleonForConditionalGeneration,
    LossOptions,
    tie_head_norms,
)
from medley.modeling.dims import ModelDims
from medley.phantoms import change_document, curriculum, documents
from medley.utils.files import atomic_file
from medley.vqgan import VQGAN
from medley.vqgan.files import to_hugging_face_config
from training.tiny.recipe import Options, cosine

UNUSED_MARGIN = 20.0  # approximate distance of unused image tokens' logits below the log-partition
FIT_BATCHES = 24  # number of batches for the least-squares fit of those logits
LAST_CHUNK = 10**6  # the number of a chunk that no training reaches
IMAGE_WEIGHT = 0.5  # of an image token in the loss; there are two image tokens per answer token


class NarrowVocabulary:
    """The vocabulary without the image tokens that the VQGAN never emits.

    Training leaves out their rows of the embedding and head: a head over 1,700 ids costs a fifth
    of one over 9,300.

    Attributes:
        to_narrow: int64 (V,), the narrow id of each id, -1 for an unused one; ascending
        to_wide: int64 (N,), the id of each narrow id; ascending
        image_tokens: (active codes,), the ids of the used image tokens
        names: narrow id of each token by name
    """

    def __init__(self, tokenizer: TextTokenizer, active_codes: int) -> None:
        image_tokens = tokenizer.vocabulary.image_codes
        ids = torch.arange(tokenizer.vocabulary.size)
        unused = (ids >= image_tokens.start + active_codes) & (ids < image_tokens.stop)
        self.to_wide = ids[~unused]
        self.to_narrow = torch.full_like(ids, -1)
        self.to_narrow[self.to_wide] = torch.arange(len(self.to_wide))
        self.image_tokens = torch.arange(image_tokens.start, image_tokens.start + active_codes)
        names = tokenizer.raw_tokenizer.get_vocab()
        self.names = {n: int(self.to_narrow[i]) for n, i in names.items() if not unused[i]}

    def convert(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch with narrow ids and labels."""
        ids, labels = self.to_narrow[batch["input_ids"]], batch["labels"]
        assert (ids >= 0).all(), "the VQGAN emitted an unused code"
        return batch | {
            "input_ids": ids,
            "labels": torch.where(
                labels == IGNORE_INDEX, labels, self.to_narrow[labels.clamp(min=0)]
            ),
        }


def empty_decoder(
    options: Options, tokenizer: TextTokenizer, vqgan: VQGAN, names: dict[str, int]
) -> ChameleonForConditionalGeneration:
    """A decoder over the ids of `names`, with random weights."""
    dims = ModelDims(
        width=options.width, layers=options.layers, heads=options.heads,
        key_value_heads=options.heads, feed_forward=feed_forward_width(options.width),
        vocabulary_size=len(names), context=options.context,
    )  # fmt: skip
    vq_config = to_hugging_face_config(vqgan.config)
    return ChameleonForConditionalGeneration(dims.to_config(vq_config, names, tokenizer.vocabulary))


def new_decoder(
    options: Options, tokenizer: TextTokenizer, vqgan: VQGAN, narrow: NarrowVocabulary
) -> ChameleonForConditionalGeneration:
    """The decoder to train, over the narrow vocabulary.

    The rows of the image tokens start as a random projection of the codebook. Codes with similar
    vectors therefore start with similar rows, which speeds up the training of a small model.
    """
    torch.manual_seed(options.seed + 1)
    decoder = empty_decoder(options, tokenizer, vqgan, narrow.names)
    vectors = vqgan.quantize.embedding.weight.detach()
    codebook = (vectors - vectors.mean(0)) / vectors.std()
    with torch.no_grad():
        for table in (decoder.model.embed_tokens.weight, decoder.lm_head.weight):
            rows = table[tokenizer.vocabulary.image_codes.start :][: options.active_codes]
            projected = codebook @ torch.randn(codebook.shape[1], options.width)
            projected = projected / projected.std() * decoder.config.initializer_range * 0.9
            rows.mul_(0.4).add_(projected)
    return decoder


@torch.no_grad()
def widen(
    options: Options,
    tokenizer: TextTokenizer,
    vqgan: VQGAN,
    narrow: NarrowVocabulary,
    trained: ChameleonForConditionalGeneration,
) -> ChameleonForConditionalGeneration:
    """The trained decoder over the full vocabulary.

    Codes that the VQGAN never emits must not be sampled, also not under classifier-free guidance,
    which amplifies differences between two branches. One row of the head serves all of them: the
    least-squares solution of `states @ row = log-partition - UNUSED_MARGIN` over the positions
    before an image token.
    """
    states, targets = [], []
    head = trained.lm_head.weight
    # This implementation keeps packed documents separate also without labels.
    trained.set_attn_implementation("sdpa")
    for wide in islice(batches(options, tokenizer, vqgan, LAST_CHUNK), FIT_BATCHES):
        batch = narrow.convert(wide)
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        hidden = trained.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        before_image_tokens = torch.isin(wide["input_ids"][:, 1:], narrow.image_tokens)
        states.append(hidden[before_image_tokens].float())
        targets.append((states[-1] @ head.T).logsumexp(-1, keepdim=True) - UNUSED_MARGIN)
    target = torch.cat(targets)
    # In float64: the last bits of MKL's float32 solution differ from run to run (they depend on
    # the alignment of its workspace), so a resumed run would end with another row.
    solution = torch.linalg.lstsq(torch.cat(states).double(), target.double()).solution
    unused_row = solution[:, 0].float()
    margin = UNUSED_MARGIN - float((torch.cat(states) @ unused_row[:, None] - target).max())
    print(f"unused codes: at least {margin:.1f} below the log-partition", flush=True)
    wide_names = tokenizer.raw_tokenizer.get_vocab()
    decoder = empty_decoder(options, tokenizer, vqgan, wide_names).eval()
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    others = {n: t for n, t in trained.state_dict().items() if n not in tables}
    result = decoder.load_state_dict(others, strict=False)
    assert set(result.missing_keys) == set(tables) and not result.unexpected_keys
    embeddings = decoder.model.embed_tokens.weight
    embeddings[:] = trained.model.embed_tokens.weight.mean(0)
    embeddings[narrow.to_wide] = trained.model.embed_tokens.weight
    decoder.lm_head.weight[:] = unused_row
    decoder.lm_head.weight[narrow.to_wide] = head
    return decoder


def feed_forward_width(width: int, multiple_of: int = 256) -> int:
    """Chameleon's rule: two thirds of four times the width, rounded up to `multiple_of`."""
    return -(-int(8 * width / 3) // multiple_of) * multiple_of


@torch.no_grad()
def phantom_sequences(
    tokenizer: TextTokenizer, vqgan: VQGAN, seed: int, chunk: int
) -> list[NDArray[np.int64]]:
    """Token sequences of all documents about a chunk of phantoms."""
    scans, follow_ups, rng = curriculum.sample_chunk(seed, chunk)
    size = vqgan.config.resolution
    rendered = [scan.render(size) for scan in (*scans, *(scan for scan, _ in follow_ups))]
    pixels = torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2).float() / 127.5 - 1
    codes = torch.cat([vqgan.encode(part) for part in pixels.split(64)]).tolist()
    images = [ImagePart(codes=tuple(image_codes)) for image_codes in codes]
    found: list[Document] = []
    for scan, image in zip(scans, images, strict=False):
        found += documents(scan, image, rng)
    for number, (_, change) in enumerate(follow_ups):
        before = images[number * curriculum.FOLLOW_UP_INTERVAL]
        found.append(change_document(before, images[len(scans) + number], change))
    return [np.array(document.to_ids(tokenizer), dtype=np.int64) for document in found]


def best_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Packs documents into sequences by best-fit decreasing; returns the indices of each sequence.

    The embedded model was trained with this packing. Training now uses
    `medley.data.packing.pack_balanced`, which gives better models; the next training of the
    embedded model should use it as well.
    """
    packed: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, sequence), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > row_length:
            raise UserError(
                f"--row_length {row_length}: A document has {lengths[index]} tokens. Increase it."
            )
        position = bisect_left(free, (lengths[index], -1))
        if position == len(free):
            packed.append([])
        is_new = position == len(free)
        room, sequence = (row_length, len(packed) - 1) if is_new else free.pop(position)
        packed[sequence].append(index)
        insort(free, (room - lengths[index], sequence))
    return [sorted(sequence) for sequence in packed]


def batches(
    options: Options, tokenizer: TextTokenizer, vqgan: VQGAN, chunk: int
) -> Iterator[dict[str, Tensor]]:
    """The packed sequences of one chunk of scans, without the last incomplete batch."""
    sequences = phantom_sequences(tokenizer, vqgan, options.seed, chunk)
    rows = best_fit([len(sequence) for sequence in sequences], options.row_length)
    np.random.default_rng((options.seed + 2, chunk)).shuffle(rows)
    for start in range(0, len(rows) - options.decoder_rows + 1, options.decoder_rows):
        packed = [
            build_sequence([sequences[i] for i in row], tokenizer.vocabulary)
            for row in rows[start : start + options.decoder_rows]
        ]
        yield collate(packed, tokenizer.vocabulary)


class Optimizers:
    """Muon for the layers' matrices, AdamW for the rest (embeddings, head, norms)."""

    def __init__(self, decoder: nn.Module, options: Options) -> None:
        named = [(n, p) for n, p in decoder.named_parameters() if ".vqmodel." not in n]
        self.weights = [p for _, p in named]
        matrices = [p for n, p in named if p.ndim == 2 and ".layers." in n and "_norm" not in n]
        matrix_ids = {id(p) for p in matrices}
        rest = [p for p in self.weights if id(p) not in matrix_ids]
        muon = torch.optim.Muon(matrices, lr=1.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(rest, lr=1.0, weight_decay=0.01, betas=(0.9, 0.95))
        self.optimizers = ((muon, options.matrix_lr), (adamw, options.decoder_lr))

    def step(self, fraction: float) -> None:
        """Updates the weights with a fraction of the peak learning rates."""
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * fraction
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> list[Any]:
        return [optimizer.state_dict() for optimizer, _ in self.optimizers]

    def load_state_dict(self, state: list[Any]) -> None:
        for (optimizer, _), own in zip(self.optimizers, state, strict=True):
            optimizer.load_state_dict(own)


def train_decoder(
    options: Options,
    tokenizer: TextTokenizer,
    vqgan: VQGAN,
    log: dict[str, Any],
    checkpoint: Path,
) -> ChameleonForConditionalGeneration:
    """Trains the decoder and saves its state to `checkpoint` after every chunk of scans.

    An interrupted run resumes from the checkpoint and ends with the same weights. Adds to `log` the
    loss curve as "decoder", and the number of chunks used as "chunks".
    """
    narrow = NarrowVocabulary(tokenizer, options.active_codes)
    decoder = new_decoder(options, tokenizer, vqgan, narrow).train()
    decoder.loss_options = LossOptions(image_weight=IMAGE_WEIGHT)
    tie_head_norms(decoder)
    set_attention(decoder, "sdpa", torch.bfloat16)
    optimizers = Optimizers(decoder, options)
    step = chunk = 0
    curve: list[dict[str, float]] = []
    sums = torch.zeros(4, dtype=torch.float64)  # text loss, its tokens, image loss, its tokens
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        decoder.load_state_dict(state["decoder"])
        optimizers.load_state_dict(state["optimizers"])
        step, chunk = state["step"], state["chunk"]
        curve, sums = state["log"], state["sums"]
    start, first_step = time.monotonic(), step
    while step < options.decoder_steps:
        step_before = step
        for wide in batches(options, tokenizer, vqgan, chunk):
            batch = narrow.convert(wide)
            with torch.autocast("cpu", torch.bfloat16):
                loss = decoder(**batch).loss
            loss.backward()
            optimizers.step(cosine(step, options.decoder_steps, 100))
            assert decoder.loss_sums is not None
            sums += decoder.loss_sums
            step += 1
            if step % 50 == 0 or step == options.decoder_steps:
                text, image = (sums[0] / sums[1]).item(), (sums[2] / sums[3]).item()
                curve.append({"step": step, "text_loss": text, "image_loss": image})
                seconds_per_step = (time.monotonic() - start) / (step - first_step)
                print(
                    f"decoder step {step:5d}  text loss {text:.4f}  image loss {image:.4f}  "
                    f"{seconds_per_step * (options.decoder_steps - step) / 60:.1f} min left",
                    flush=True,
                )
                sums.zero_()
            if step == options.decoder_steps:
                break
        if step == step_before:
            raise UserError(
                f"--decoder_rows {options.decoder_rows}: The documents of "
                f"{curriculum.SCANS_PER_CHUNK} scans do not fill a batch. Reduce it."
            )
        chunk += 1
        with atomic_file(checkpoint) as temporary:
            state = {"decoder": decoder.state_dict(), "optimizers": optimizers.state_dict(),
                     "step": step, "chunk": chunk, "log": curve, "sums": sums}  # fmt: skip
            torch.save(state, temporary)
    log |= {"decoder": curve, "chunks": chunk}
    return widen(options, tokenizer, vqgan, narrow, decoder.eval())
