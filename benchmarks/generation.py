"""Generation: tokens a second beside transformers' generate, guided pictures, and a mixed load.

    python benchmarks/generation.py

Random weights, 6 layers, 256 wide, float32. Baselines in the same run: transformers' `generate`
(greedy, batches of unequal prompts), a plain loop that runs the three streams of guidance one after
another with transformers' cache, and this engine with one request after the other.
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

MARKS = open_checkpoint("tiny").text_tokenizer().vocabulary


@dataclass(frozen=True)
class Options:
    """Measures generation.

    Args:
        layers: layers of the decoder
        width: its width
        tokens: new tokens of each row
        codes: codes of a picture
        rounds: runs of each, of which the fastest counts
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
    times, found = [], None
    for _ in range(rounds):
        start = time.perf_counter()
        found = work()
        times.append(time.perf_counter() - start)
    return min(times), found


def prompts_of(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = [20 + 7 * i for i in range(count)]
    first, last = MARKS.image + 1, MARKS.size
    return [
        [MARKS.bos, *torch.randint(first, last, (n,), generator=generator).tolist(), MARKS.end_turn]
        for n in lengths
    ]


@torch.inference_mode()
def work(options: Options) -> None:
    warnings.simplefilter("ignore")
    decoder = make_decoder(options)
    result: dict[str, Any] = {"benchmark": "generation"}
    theirs = {n: stock(decoder, prompts_of(n), options) for n in (1, 8)}
    plain = fastest(lambda: plain_guided(decoder, prompts_of(1)[0], options), options.rounds)[0]
    engine = Engine(decoder, MARKS, options.codes, fuse=True)  # from here on weights are joined
    for count in (1, 8):
        prompts = prompts_of(count)
        text = GenerationOptions(
            mode="text", text_greedy=True, repetition_penalty=1, max_new_tokens=options.tokens
        )
        requests = [Request(p, text, i) for i, p in enumerate(prompts)]
        seconds, found = fastest(lambda: engine.generate(requests), options.rounds)  # noqa: B023
        stock_seconds, ids = theirs[count]
        same = sum(a.ids == b for a, b in zip(found, ids, strict=True))
        result[f"text_batch_{count}"] = {
            "ms_a_step": 1000 * seconds / options.tokens,
            "transformers_ms_a_step": 1000 * stock_seconds / options.tokens,
            "times_transformers": stock_seconds / seconds,
            "same_answers": f"{same} of {count}",
        }
        print(result[f"text_batch_{count}"], flush=True)
    request = Request(prompts_of(1)[0], GenerationOptions(mode="image"), 0)
    seconds, _ = fastest(lambda: engine.generate([request]), options.rounds)
    result["guided_picture"] = {
        "seconds": seconds, "plain_loop_seconds": plain, "times_plain": plain / seconds,
    }  # fmt: skip
    print(result["guided_picture"], flush=True)
    load = mixed_load(options)
    together, _ = fastest(lambda: engine.generate(load), options.rounds)
    alone, _ = fastest(lambda: [engine.generate([r]) for r in load], 1)
    result["mixed_load"] = {
        "seconds": together, "one_after_another": alone, "share": together / alone,
    }  # fmt: skip
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps(result))


def mixed_load(options: Options) -> list[Request]:
    """16 requests: words, pictures, both; prompts and answers of many lengths."""
    requests = []
    for number, prompt in enumerate(prompts_of(16)):
        mode = ("text", "image", "any", "text")[number % 4]
        limit = 40 + 13 * number if mode == "text" else options.codes + 60
        chosen = GenerationOptions(
            mode=mode, max_new_tokens=limit, min_images=int(mode == "any"), max_images=None
            if mode == "text" else 1,
        )  # fmt: skip
        requests.append(Request(prompt, chosen, number))
    return requests


def stock(decoder: Any, prompts: list[list[int]], options: Options) -> tuple[float, Any]:
    """transformers' generate, prompts padded on the left, with the marks suppressed."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[MARKS.pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    text = set(MARKS.text_tokens) | {MARKS.eos, MARKS.end_turn}
    suppressed = [i for i in range(decoder.config.vocab_size) if i not in text]

    def run() -> Tensor:
        found: Tensor = decoder.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=options.tokens,
            eos_token_id=[MARKS.eos, MARKS.end_turn], pad_token_id=MARKS.pad,
            suppress_tokens=suppressed,
        )  # fmt: skip
        return found[:, longest:]

    seconds, found = fastest(run, options.rounds)
    return seconds, found.tolist()


def plain_guided(decoder: Any, prompt: list[int], options: Options) -> list[int]:
    """One guided picture: three caches, three forward passes a code (two where they coincide are
    still three here, as Chameleon runs them)."""
    caches = [DynamicCache(config=decoder.config) for _ in range(3)]
    contexts = [[*prompt, MARKS.begin_image]] + [[MARKS.bos, MARKS.begin_image]] * 2
    ids = [torch.tensor([c]) for c in contexts]
    codes: list[int] = []
    part = slice(MARKS.image_codes.start, MARKS.image_codes.stop)
    generator = torch.Generator().manual_seed(0)
    for _ in range(options.codes):
        logits = []
        for i, cache in enumerate(caches):
            out = decoder(input_ids=ids[i], past_key_values=cache, use_cache=True)
            logits.append(out.logits[:, -1, part].float())
        mixed = apply_cfg(*logits, 3.0, 1.2) / 0.7
        uniform = torch.rand(1, generator=generator, dtype=torch.float64)
        codes.append(part.start + int(sample(mixed, uniform, 0, 0.9)))
        ids = [torch.tensor([[codes[-1]]])] * 3
    return codes


if __name__ == "__main__":
    sys.exit(main())
