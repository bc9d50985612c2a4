"""Generation speed, compared with transformers' generate and plain loops.

    python benchmarks/generation.py

Random weights, 6 layers, hidden size 256, float32. The baselines: for text, transformers'
`generate` (greedy, batches of prompts with different lengths); for guided images, a plain loop that
runs the three CFG branches sequentially with transformers' cache; for a mixed load, this engine
with sequential requests.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from medley.checkpoints.checkpoint import open_checkpoint
from medley.generation import Engine, GenerationOptions, Request
from medley.generation.sampling import apply_cfg, sample
from medley.modeling.chameleon import ChameleonForConditionalGeneration
from medley.utils.cli_options import run_program

VOCABULARY = open_checkpoint("tiny").text_tokenizer().vocabulary


@dataclass(frozen=True)
class Options:
    """Measures generation.

    Args:
        layers: layers of the decoder
        width: hidden size of the decoder
        tokens: new tokens of each sequence
        codes: image codes per image
        rounds: runs of each variant; the fastest counts
    """

    layers: int = 6
    width: int = 256
    tokens: int = 256
    codes: int = 256
    rounds: int = 3


def main(argv: list[str] | None = None) -> int:
    return run_program("benchmarks/generation.py", Options, work, argv)


def make_decoder(options: Options) -> Any:
    torch.manual_seed(0)
    config = open_checkpoint("tiny").config()
    config.hidden_size, config.num_hidden_layers = options.width, options.layers
    config.num_attention_heads = config.num_key_value_heads = options.width // 64
    config.intermediate_size = options.width * 11 // 4
    config.vocab_size = 10_240
    config._attn_implementation = "sdpa"
    return ChameleonForConditionalGeneration(config).eval()


def fastest(work: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """The seconds of the fastest run, and the result of the last one."""
    times, result = [], None
    for _ in range(rounds):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return min(times), result


def make_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = [20 + 7 * i for i in range(count)]
    first, last = VOCABULARY.image_placeholder + 1, VOCABULARY.size
    return [
        [
            VOCABULARY.bos,
            *torch.randint(first, last, (n,), generator=generator).tolist(),
            VOCABULARY.end_turn,
        ]
        for n in lengths
    ]


@torch.inference_mode()
def work(options: Options) -> None:
    warnings.simplefilter("ignore")
    decoder = make_decoder(options)
    result: dict[str, Any] = {"benchmark": "generation"}
    baselines = {n: transformers_generate(decoder, make_prompts(n), options) for n in (1, 8)}
    plain = fastest(
        lambda: plain_guided_image(decoder, make_prompts(1)[0], options), options.rounds
    )[0]
    engine = Engine(decoder, VOCABULARY, options.codes, fuse=True)  # fuses the weights in place
    for count in (1, 8):
        prompts = make_prompts(count)
        text = GenerationOptions(
            mode="text", text_greedy=True, repetition_penalty=1, max_new_tokens=options.tokens
        )
        requests = [Request(p, text, i) for i, p in enumerate(prompts)]
        seconds, outputs = fastest(lambda: engine.generate(requests), options.rounds)  # noqa: B023
        baseline_seconds, ids = baselines[count]
        same = sum(a.ids == b for a, b in zip(outputs, ids, strict=True))
        result[f"text_batch_{count}"] = {
            "ms_a_step": 1000 * seconds / options.tokens,
            "transformers_ms_a_step": 1000 * baseline_seconds / options.tokens,
            "times_transformers": baseline_seconds / seconds,
            "same_answers": f"{same} of {count}",
        }
        print(result[f"text_batch_{count}"], flush=True)
    request = Request(make_prompts(1)[0], GenerationOptions(mode="image"), 0)
    seconds, _ = fastest(lambda: engine.generate([request]), options.rounds)
    result["guided_image"] = {
        "seconds": seconds, "plain_loop_seconds": plain, "times_plain": plain / seconds,
    }  # fmt: skip
    print(result["guided_image"], flush=True)
    load = mixed_load(options)
    concurrent, _ = fastest(lambda: engine.generate(load), options.rounds)
    sequential, _ = fastest(lambda: [engine.generate([r]) for r in load], 1)
    result["mixed_load"] = {
        "seconds": concurrent, "one_after_another": sequential, "share": concurrent / sequential,
    }  # fmt: skip
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps(result))


def mixed_load(options: Options) -> list[Request]:
    """16 requests for text, images or both, with different prompt and response lengths."""
    requests = []
    for number, prompt in enumerate(make_prompts(16)):
        mode = ("text", "image", "any", "text")[number % 4]
        limit = 40 + 13 * number if mode == "text" else options.codes + 60
        generation = GenerationOptions(
            mode=mode, max_new_tokens=limit, min_images=int(mode == "any"), max_images=None
            if mode == "text" else 1,
        )  # fmt: skip
        requests.append(Request(prompt, generation, number))
    return requests


def transformers_generate(
    decoder: Any, prompts: list[list[int]], options: Options
) -> tuple[float, Any]:
    """transformers' generate, with left-padded prompts and suppressed special tokens."""
    length = max(map(len, prompts))
    ids = torch.tensor([[VOCABULARY.pad] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    text = set(VOCABULARY.text_tokens) | {VOCABULARY.eos, VOCABULARY.end_turn}
    suppressed = [i for i in range(decoder.config.vocab_size) if i not in text]

    def run() -> Tensor:
        generated: Tensor = decoder.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=options.tokens,
            eos_token_id=[VOCABULARY.eos, VOCABULARY.end_turn], pad_token_id=VOCABULARY.pad,
            suppress_tokens=suppressed,
        )  # fmt: skip
        return generated[:, length:]

    seconds, generated = fastest(run, options.rounds)
    return seconds, generated.tolist()


def plain_guided_image(decoder: Any, prompt: list[int], options: Options) -> list[int]:
    """One guided image with three caches and three forward passes per token, as in Chameleon.

    Two of the branches may be identical; they still run separately.
    """
    caches = [DynamicCache(config=decoder.config) for _ in range(3)]
    contexts = [[*prompt, VOCABULARY.begin_image]] + [[VOCABULARY.bos, VOCABULARY.begin_image]] * 2
    ids = [torch.tensor([c]) for c in contexts]
    tokens: list[int] = []
    image_tokens = slice(VOCABULARY.image_codes.start, VOCABULARY.image_codes.stop)
    generator = torch.Generator().manual_seed(0)
    for _ in range(options.codes):
        logits = []
        for i, cache in enumerate(caches):
            out = decoder(input_ids=ids[i], past_key_values=cache, use_cache=True)
            logits.append(out.logits[:, -1, image_tokens].float())
        guided = apply_cfg(*logits, 3.0, 1.2) / 0.7
        uniform = torch.rand(1, generator=generator, dtype=torch.float64)
        tokens.append(image_tokens.start + int(sample(guided, uniform, 0, 0.9)))
        ids = [torch.tensor([[tokens[-1]]])] * 3
    return tokens


if __name__ == "__main__":
    sys.exit(main())
