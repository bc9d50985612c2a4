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
    decoder_config,
    tie_head_norms,
)
from medley.phantoms import change_document, documents, lessons
from medley.utils.files import atomic_file
from medley.vqgan import VQGAN
from medley.vqgan.files import to_hugging_face_config
from training.tiny.recipe import Options, cosine

BELOW = 20.0  # the log-partition: where the logits of codes that are never given lie, about
QUIET_BATCHES = 24  # from which that is learned
LAST_CHUNK = 10**6  # the number of a chunk that no training reaches
IMAGE_WEIGHT = 0.5  # of a picture's token in the loss: there are two for each of an answer


class Narrow:
    """The vocabulary without the image codes that the VQGAN never gives.

    Training does without their rows: the head over 1,700 ids costs a fifth of what it costs over
    9,300. `to_narrow` int64 (V,) holds the narrow id of each id, `kept` (N,) the id of each narrow
    one, both in order; `codes` (active codes,) are the ids of image codes that are kept.
    """

    def __init__(self, tokenizer: TextTokenizer, active_codes: int) -> None:
        codes = tokenizer.vocabulary.image_codes
        ids = torch.arange(tokenizer.vocabulary.size)
        unused = (ids >= codes.start + active_codes) & (ids < codes.stop)
        self.kept = ids[~unused]
        self.to_narrow = torch.full_like(ids, -1)
        self.to_narrow[self.kept] = torch.arange(len(self.kept))
        self.codes = torch.arange(codes.start, codes.start + active_codes)
        names = tokenizer.marked.get_vocab()
        self.names = {n: int(self.to_narrow[i]) for n, i in names.items() if not unused[i]}

    def batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, labels = self.to_narrow[batch["input_ids"]], batch["labels"]
        assert (ids >= 0).all(), "the VQGAN gave a code that it should not use"
        return batch | {
            "input_ids": ids,
            "labels": torch.where(
                labels == IGNORE_INDEX, labels, self.to_narrow[labels.clamp(min=0)]
            ),
        }


def empty_decoder(
    options: Options, tokenizer: TextTokenizer, vqgan: VQGAN, names: dict[str, int]
) -> ChameleonForConditionalGeneration:
    """A decoder over the ids of `names`, with fresh weights."""
    config = decoder_config(
        width=options.width, layers=options.layers, heads=options.heads, key_value_heads=None,
        feed_forward=feed_forward_width(options.width), vocabulary_size=len(names),
        context=options.context, rope_theta=10_000.0, norm_eps=1e-5, swin_norm=False,
        model_parallel_size=1,
        vq_config=to_hugging_face_config(vqgan.config),
        vocabulary_map=names, marks=tokenizer.vocabulary,
    )  # fmt: skip
    return ChameleonForConditionalGeneration(config)


def new_decoder(
    options: Options, tokenizer: TextTokenizer, vqgan: VQGAN, narrow: Narrow
) -> ChameleonForConditionalGeneration:
    """The decoder that is trained. Codes that look alike start alike: the rows of the image codes
    begin as a random projection of the codebook, which a model this small learns from far sooner.
    """
    torch.manual_seed(options.seed + 1)
    decoder = empty_decoder(options, tokenizer, vqgan, narrow.names)
    used = vqgan.quantize.embedding.weight.detach()
    codebook = (used - used.mean(0)) / used.std()
    with torch.no_grad():
        for table in (decoder.model.embed_tokens.weight, decoder.lm_head.weight):
            rows = table[tokenizer.vocabulary.image_codes.start :][: options.active_codes]
            like = codebook @ torch.randn(codebook.shape[1], options.width)
            rows.mul_(0.4).add_(like / like.std() * decoder.config.initializer_range * 0.9)
    return decoder


@torch.no_grad()
def widened(
    options: Options,
    tokenizer: TextTokenizer,
    vqgan: VQGAN,
    narrow: Narrow,
    trained: ChameleonForConditionalGeneration,
) -> ChameleonForConditionalGeneration:
    """The trained decoder over the whole vocabulary.

    Codes that the VQGAN never gives must not be drawn, under guidance neither, which multiplies
    what two passes differ by: one row of the head serves all of them, the least-squares answer to
    `states @ row = log-partition - BELOW` over places where a code comes next.
    """
    states, targets = [], []
    head = trained.lm_head.weight
    trained.set_attn_implementation("sdpa")  # keeps packed documents apart without labels, too
    for wide in islice(batches(options, tokenizer, vqgan, LAST_CHUNK), QUIET_BATCHES):
        batch = narrow.batch(wide)
        places = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        found = trained.model(**places, use_cache=False).last_hidden_state[:, :-1]
        before_codes = torch.isin(wide["input_ids"][:, 1:], narrow.codes)
        states.append(found[before_codes].float())
        targets.append((states[-1] @ head.T).logsumexp(-1, keepdim=True) - BELOW)
    wanted = torch.cat(targets)
    quiet = torch.linalg.lstsq(torch.cat(states), wanted).solution[:, 0]
    above = float((torch.cat(states) @ quiet[:, None] - wanted).max()) - BELOW
    print(f"unused codes: at least {-above:.1f} below the log-partition", flush=True)
    whole = empty_decoder(options, tokenizer, vqgan, tokenizer.marked.get_vocab()).eval()
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    others = {n: t for n, t in trained.state_dict().items() if n not in tables}
    found = whole.load_state_dict(others, strict=False)
    assert set(found.missing_keys) == set(tables) and not found.unexpected_keys
    embeddings = whole.model.embed_tokens.weight
    embeddings[:] = trained.model.embed_tokens.weight.mean(0)
    embeddings[narrow.kept] = trained.model.embed_tokens.weight
    whole.lm_head.weight[:] = quiet
    whole.lm_head.weight[narrow.kept] = head
    return whole


def feed_forward_width(width: int, multiple_of: int = 256) -> int:
    """Chameleon's rule: two thirds of four times the width, rounded up to `multiple_of`."""
    return -(-int(8 * width / 3) // multiple_of) * multiple_of


@torch.no_grad()
def phantom_sequences(
    tokenizer: TextTokenizer, vqgan: VQGAN, seed: int, chunk: int
) -> list[NDArray[np.int64]]:
    """Token sequences of all the documents about a chunk of phantoms."""
    scans, later, rng = lessons.chunk_of_scans(seed, chunk)
    size = vqgan.config.resolution
    drawn = np.stack([scan.draw(size) for scan in (*scans, *(scan for scan, _ in later))])
    pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    codes = torch.cat([vqgan.encode(part) for part in pixels.split(64)]).tolist()
    pictures = [ImagePart(codes=tuple(own)) for own in codes]
    found: list[Document] = []
    for scan, picture in zip(scans, pictures, strict=False):
        found += documents(scan, picture, rng)
    for place, (_, change) in enumerate(later):
        before, after = pictures[place * lessons.CHANGED], pictures[len(scans) + place]
        found.append(change_document(before, after, change))
    return [np.array(document.to_ids(tokenizer), dtype=np.int64) for document in found]


def best_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Places whole documents into rows: longest first, each into the fullest row it fits.

    Training packs evenly since (`medley.data.packing.pack_evenly`), which teaches more; this is
    what the embedded model was made with, and goes with its next training.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > row_length:
            raise UserError(f"a document of {lengths[index]} tokens, --row_length is {row_length}")
        place = bisect_left(free, (lengths[index], -1))
        if place == len(free):
            rows.append([])
        room, row = free.pop(place) if place < len(free) else (row_length, len(rows) - 1)
        rows[row].append(index)
        insort(free, (room - lengths[index], row))
    return [sorted(row) for row in rows]


def batches(
    options: Options, tokenizer: TextTokenizer, vqgan: VQGAN, chunk: int
) -> Iterator[dict[str, Tensor]]:
    """The packed rows of one chunk of scans, but for the last ones that make no whole batch."""
    sequences = phantom_sequences(tokenizer, vqgan, options.seed, chunk)
    rows = best_fit([len(s) for s in sequences], options.row_length)
    np.random.default_rng((options.seed + 2, chunk)).shuffle(rows)
    for start in range(0, len(rows) - options.decoder_rows + 1, options.decoder_rows):
        chosen = rows[start : start + options.decoder_rows]
        packed = [
            build_sequence([sequences[i] for i in row], tokenizer.vocabulary) for row in chosen
        ]
        yield collate(packed, tokenizer.vocabulary)


class Optimizers:
    """Muon for the layers' matrices, AdamW for the rest (embeddings, head, norms)."""

    def __init__(self, decoder: nn.Module, options: Options) -> None:
        named = [(n, p) for n, p in decoder.named_parameters() if ".vqmodel." not in n]
        self.weights = [p for _, p in named]
        matrices = [p for n, p in named if p.ndim == 2 and ".layers." in n and "_norm" not in n]
        own = {id(p) for p in matrices}
        rest = [p for p in self.weights if id(p) not in own]
        muon = torch.optim.Muon(matrices, lr=1.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(rest, lr=1.0, weight_decay=0.01, betas=(0.9, 0.95))
        self.all = ((muon, options.matrix_lr), (adamw, options.decoder_lr))

    def step(self, share: float) -> None:
        """Of the peak learning rates, that share."""
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer, peak in self.all:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> list[Any]:
        return [optimizer.state_dict() for optimizer, _ in self.all]

    def load(self, state: list[Any]) -> None:
        for (optimizer, _), own in zip(self.all, state, strict=True):
            optimizer.load_state_dict(own)


def train_decoder(
    options: Options,
    tokenizer: TextTokenizer,
    vqgan: VQGAN,
    log: dict[str, Any],
    save: Path,
) -> ChameleonForConditionalGeneration:
    """Trains, and keeps its state in `save` behind every chunk of scans: a run that was stopped
    goes on from there to the same weights. `log` gets the curve as "decoder", and as "chunks" how
    many chunks of scans were learned from."""
    narrow = Narrow(tokenizer, options.active_codes)
    decoder = new_decoder(options, tokenizer, vqgan, narrow).train()
    decoder.loss_options = LossOptions(image_weight=IMAGE_WEIGHT)
    tie_head_norms(decoder)
    set_attention(decoder, "sdpa", torch.bfloat16)  # document by document
    optimizers = Optimizers(decoder, options)
    step = chunk = 0
    curve: list[dict[str, float]] = []
    sums = torch.zeros(4, dtype=torch.float64)
    if save.exists():
        state = torch.load(save, weights_only=True)
        decoder.load_state_dict(state["decoder"])
        optimizers.load(state["optimizers"])
        step, chunk = state["step"], state["chunk"]
        curve, sums = state["log"], state["sums"]
    began, first = time.monotonic(), step
    while step < options.decoder_steps:
        before = step
        for wide in batches(options, tokenizer, vqgan, chunk):
            batch = narrow.batch(wide)
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
                left = (time.monotonic() - began) / (step - first) * (options.decoder_steps - step)
                print(
                    f"decoder step {step:5d}  text loss {text:.4f}  image loss {image:.4f}  "
                    f"{left / 60:.1f} min left",
                    flush=True,
                )
                sums.zero_()
            if step == options.decoder_steps:
                break
        if step == before:
            raise UserError(
                f"--decoder_rows {options.decoder_rows}: more than {lessons.SCANS} scans fill; "
                "expected fewer"
            )
        chunk += 1
        with atomic_file(save) as temporary:
            state = {"decoder": decoder.state_dict(), "optimizers": optimizers.state(),
                     "step": step, "chunk": chunk, "log": curve, "sums": sums}  # fmt: skip
            torch.save(state, temporary)
    log |= {"decoder": curve, "chunks": chunk}
    return widened(options, tokenizer, vqgan, narrow, decoder.eval())
