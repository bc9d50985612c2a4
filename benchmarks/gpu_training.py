"""The sections of benchmarks/gpu.py that train, compare attention kernels and merge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gpu_generation import BF16, prompts, timed
from random_models import SIZES, STD, ModelSize, make_decoder, tiny_vocabulary

from medley.data.packing import build_sequence, collate
from medley.inference.loading import merge_adapter
from medley.modeling.attention import Attention, Documents, set_attention, unavailable_reason
from medley.modeling.chameleon import label_positions
from medley.trainer.options import TrainOptions
from medley.trainer.parameters import PROJECTIONS, trainable_model
from medley.trainer.preflight import make_flop_counter
from medley.trainer.summary import estimate_memory

if TYPE_CHECKING:
    from gpu import Report

DOCUMENTS = 4  # in one packed sequence
SEQUENCES = 4  # in a batch on a GPU
CLOSE = 0.05  # relative difference that bfloat16 explains, of gradients and of logits


def make_batch(size: ModelSize, sequences: int, device: torch.device) -> dict[str, Any]:
    """Packed sequences of the whole context, all tokens with labels, as the trainer makes them."""
    vocabulary, generator = tiny_vocabulary(), np.random.default_rng(0)
    ids = np.array([*sorted(vocabulary.text_tokens), *vocabulary.image_codes])
    length = size.decoder.context // DOCUMENTS
    packed = [
        build_sequence([generator.choice(ids, length) for _ in range(DOCUMENTS)], vocabulary, "all")
        for _ in range(sequences)
    ]
    batch: dict[str, Any] = dict(collate(packed, vocabulary))
    batch["documents"] = Documents.of(batch["position_ids"])
    batch["label_positions"] = label_positions(batch["labels"][:, 1:])
    return {name: value.to(device) for name, value in batch.items()}


def make_lora(decoder: Any, dropout: float = 0.05) -> Any:
    return trainable_model(
        decoder, "lora", tiny_vocabulary(), "random", rank=16, alpha=16, dropout=dropout,
        targets=PROJECTIONS,
    )  # fmt: skip


def train_lora(report: Report) -> None:
    """Steps of LoRA of rank 16 on all projections, with gradient checkpointing, in bfloat16."""
    size, device = SIZES[report.size], report.device
    is_gpu = device.type == "cuda"
    decoder = make_decoder(size, device, BF16)
    report.add("attention", set_attention(decoder, "auto", BF16))
    model = make_lora(decoder).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(size, SEQUENCES if is_gpu else 1, device)
    tokens, labels = batch["input_ids"].numel(), len(batch["label_positions"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    options = TrainOptions(["-"], "-", Path("-"), bf16=True, gradient_checkpointing=True)
    estimate = sum(estimate_memory(options, model, tokens, labels, device).memory().values())
    losses: list[float] = []

    def step() -> None:
        with torch.autocast(device.type, BF16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    step()
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    steps = 3 if is_gpu else 1
    seconds = timed(device, lambda: [step() for _ in range(steps)]) / steps
    report.add("tokens in a step", tokens)
    report.add("LoRA with checkpointing", tokens / seconds, "tokens/s", at_least=20_000)
    flops = make_flop_counter(model, False, False, device, BF16)
    used = flops.count(tokens, labels) / seconds
    report.add("peak of a matrix product", flops.peak_flops / 1e12, "TFLOPS")
    whole = replace(flops, passes=flops.passes + 1)  # with the recomputed activations
    limit = flops.peak_flops * tokens / whole.count(tokens, labels)
    report.add("LoRA limit by matrix products", limit, "tokens/s")
    report.add("MFU, without recomputed activations", used / flops.peak_flops)
    report.add("estimated memory", estimate / 1e9, "GB")
    if is_gpu:
        peak = torch.cuda.max_memory_reserved(device) / 1e9
        report.add("memory", peak, "GB", at_most=estimate / 1e9)
        report.add("memory, share of the estimate", 1e9 * peak / estimate)
    learns = bool(np.isfinite(losses).all()) and losses[-1] != losses[0]
    report.check("losses are finite and change", learns, losses)


def compare_kernels(report: Report) -> None:
    """Loss, gradients and time of each attention kernel, on two layers of the model's width."""
    full = SIZES[report.size]
    size = replace(full, decoder=replace(full.decoder, layers=2))
    shape = (size.decoder.heads, size.decoder.width // size.decoder.heads)
    gradients: dict[str, torch.Tensor] = {}
    losses: dict[str, float] = {}
    kernels: tuple[Attention, ...] = ("sdpa", "flash", "xformers", "flex")  # flex compiles
    for kernel in kernels:
        reason = unavailable_reason(kernel, BF16, shape)
        if reason is not None:
            report.add(kernel, f"not here: {reason}")
            continue
        try:
            losses[kernel], gradients[kernel] = run_kernel(report, size, kernel)
        except Exception as error:  # the other kernels still run
            report.check(f"{kernel} runs", False, f"{type(error).__name__}: {str(error)[:200]}")
            continue
        expected = gradients["sdpa"]
        difference = float((gradients[kernel] - expected).norm() / expected.norm())
        report.check(f"{kernel} gradient equals that of sdpa", difference < CLOSE, difference)
        close = abs(losses[kernel] - losses["sdpa"]) < CLOSE * losses["sdpa"]
        report.check(f"{kernel} loss equals that of sdpa", close, losses[kernel])


def run_kernel(report: Report, size: ModelSize, kernel: Attention) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one training step; records its time."""
    device = report.device
    decoder = make_decoder(size, device, BF16)
    set_attention(decoder, kernel, BF16)
    model = make_lora(decoder, dropout=0.0).train()
    randomize_adapter(model)
    batch = make_batch(size, 1, device)

    def run() -> float:
        model.zero_grad()
        with torch.autocast(device.type, BF16):
            loss = model(**batch).loss
        loss.backward()
        return float(loss.detach())

    loss = run()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    report.add(kernel, 1000 * timed(device, run), "ms for a step of 2 layers")
    return loss, gradient


def randomize_adapter(model: Any) -> None:
    """PEFT's adapters begin without effect: their second matrices are zero."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, STD, generator=generator)


@torch.no_grad()
def merge_lora(report: Report) -> None:
    """Seconds of merging an adapter at load, and the logits before and after."""
    device = report.device
    model = make_lora(make_decoder(SIZES[report.size], device, BF16)).eval()
    randomize_adapter(model)
    ids = torch.tensor(prompts(1), device=device)
    plain = model.get_base_model()
    with model.disable_adapter():
        base = plain(input_ids=ids, use_cache=False).logits.float()
    expected = plain(input_ids=ids, use_cache=False).logits.float()
    merged: list[Any] = []
    seconds = timed(device, lambda: merged.append(merge_adapter(model)))
    report.add("merge", seconds, "s")
    found = merged[0](input_ids=ids, use_cache=False).logits.float()
    effect = float((expected - base).norm() / base.norm())
    difference = float((found - expected).norm() / expected.norm())
    report.add("effect of the adapter on the logits", effect)
    report.check("merged logits are close", difference < CLOSE, difference)
