"""Throughput of the server with 32 concurrent clients, compared with sequential requests.

    python benchmarks/serving.py
    python benchmarks/serving.py --long_prompts 12

One process of `medley serve --ckpt tiny` on loopback, with requests of mixed modes (a question
about an image, text generation, image generation). Baseline: the same requests sequentially to the
same server. Then measures the latency of the first text token with 8 active clients and on an idle
server, and the memory over many requests, none of which may be lost. Ends with one JSON line.

With `--long_prompts`, it measures instead how long a short request waits for its first token while
that many prompts of 1,500 words are read and answered, compared with an idle server.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from medley.phantoms import Phantom
from medley.utils.cli_options import run_program
from medley.utils.html import data_url

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = 0.5  # seconds between two short requests beside long prompts
MEMORY_SAMPLES = 8  # over the many requests


@dataclass(frozen=True)
class Options:
    """Measures the server.

    Args:
        clients: number of concurrent clients
        requests: number of requests of the comparison
        many: number of requests for the memory measurement
        tokens: maximum length of a text
        long_prompts: number of concurrent long prompts that a short request is measured beside
        words: words of a long prompt
        rounds: repetitions of the measurement beside long prompts
    """

    clients: int = 32
    requests: int = 96
    many: int = 2000
    tokens: int = 48
    long_prompts: int = 0
    words: int = 1500
    rounds: int = 3


def request_bodies(options: Options) -> list[dict[str, Any]]:
    images = [data_url(Phantom(m, "head", seed=i).image(64))
              for i, m in enumerate(("CT", "MR", "X-ray"))]  # fmt: skip
    bodies = []
    for number in range(options.requests):
        kind = number % 3
        text, parts = ("Describe the picture.", "Write a report.")[number % 2], []  # alias
        if kind == 0:
            url = images[number % len(images)]
            parts = [{"type": "image_url", "image_url": {"url": url}}]
        body = {"model": "tiny", "seed": number, "max_tokens": options.tokens, "mode": "text"}
        if kind == 2:
            text = "Show me a CT scan of the head."
            body |= {"mode": "image", "max_tokens": 200}
        content = [*parts, {"type": "text", "text": text}]
        bodies.append(body | {"messages": [{"role": "user", "content": content}]})
    return bodies


async def send(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    response = await client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    message = response.json()["choices"][0]["message"]
    return json.dumps([message["content"], message.get("images")])


async def send_all(
    client: httpx.AsyncClient, requests: list[dict[str, Any]], concurrency: int
) -> tuple[list[str], float]:
    """The responses in order, and the seconds for all."""
    semaphore = asyncio.Semaphore(concurrency)

    async def send_one(body: dict[str, Any]) -> str:
        async with semaphore:
            return await send(client, body)

    start = time.perf_counter()
    responses = await asyncio.gather(*(send_one(body) for body in requests))
    return list(responses), time.perf_counter() - start


async def first_token(client: httpx.AsyncClient, body: dict[str, Any]) -> float:
    """Seconds until the first text token."""
    start = time.perf_counter()
    request = body | {"stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=request) as response:
        async for line in response.aiter_lines():
            if '"content": "' in line and '"content": ""' not in line:
                return time.perf_counter() - start
    return time.perf_counter() - start


async def measure(url: str, pid: int, options: Options) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        requests = request_bodies(options)
        await send_all(client, requests[:12], 4)  # warm-up
        sequential, sequential_seconds = await send_all(client, requests, 1)
        concurrent, seconds = await send_all(client, requests, options.clients)
        text = next(body for body in requests if body["mode"] == "text")
        idle = statistics.median([await first_token(client, text) for _ in range(15)])
        busy = asyncio.create_task(send_all(client, requests * 2, 7))
        await asyncio.sleep(0.5)
        loaded: list[float] = []
        while not busy.done() and len(loaded) < 15:
            loaded.append(await first_token(client, text))
        await busy
        many = (requests * (1 + options.many // len(requests)))[: options.many]
        responses: list[str] = []
        many_seconds, memories = 0.0, [memory(pid)]
        for start in range(0, len(many), len(many) // MEMORY_SAMPLES):
            part, part_seconds = await send_all(
                client, many[start : start + len(many) // MEMORY_SAMPLES], options.clients
            )
            responses, many_seconds = responses + part, many_seconds + part_seconds
            memories.append(memory(pid))
    same = sum(a == b for a, b in zip(sequential, concurrent, strict=True))
    return {
        "benchmark": "serving", "clients": options.clients, "requests": len(requests),
        "seconds_one_after_another": sequential_seconds, "seconds_together": seconds,
        "times_the_throughput": sequential_seconds / seconds,
        "same_answers": same / len(requests),
        "first_token_idle": idle, "first_token_8_clients": statistics.median(loaded),
        "times_the_idle_first_token": statistics.median(loaded) / idle,
        "many": len(responses), "lost": options.many - len(responses),
        "requests_per_second": len(responses) / many_seconds,
        "memory_mb": memories,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }  # fmt: skip


async def measure_long_prompts(url: str, options: Options) -> dict[str, Any]:
    """First-token times of a short request, on an idle server and beside long prompts."""
    rng = random.Random(0)
    words = ("the", "scan", "of", "head", "chest", "shows", "a", "nodule", "cyst", "bright")

    def body(text: str, tokens: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        return {"model": "tiny", "seed": 0, "max_tokens": tokens, "mode": "text",
                "messages": messages}  # fmt: skip

    short = body("hi", 1)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        idle: list[float] = []
        beside: list[float] = []
        seconds: list[float] = []
        await send_all(client, [short] * 8, 1)  # warm-up
        for _ in range(options.rounds):
            idle += [await first_token(client, short) for _ in range(10)]
            texts = [" ".join(rng.choices(words, k=options.words))
                     for _ in range(options.long_prompts)]  # fmt: skip
            bodies = [body(text, options.tokens) for text in texts]
            long = asyncio.create_task(send_all(client, bodies, len(bodies)))
            # At fixed times: the next one must not wait until the server has time again.
            waiting: list[asyncio.Task[float]] = []
            while not long.done():
                await asyncio.sleep(INTERVAL)
                waiting.append(asyncio.create_task(first_token(client, short)))
            beside += await asyncio.gather(*waiting)
            seconds.append((await long)[1])
    return {
        "benchmark": "serving_long_prompts", "long_prompts": options.long_prompts,
        "words": options.words, "first_token_idle": statistics.median(idle),
        "first_token_beside": statistics.median(beside),
        "first_token_beside_90th": statistics.quantiles(beside, n=10)[-1],
        "first_token_beside_max": max(beside), "measured_beside": len(beside),
        "times_the_idle_first_token": statistics.median(beside) / statistics.median(idle),
        "seconds_of_the_long_prompts": statistics.median(seconds),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }  # fmt: skip


def memory(pid: int) -> float:
    """Anonymous memory of a process in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def work(options: Options) -> None:
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "medley", "serve", "--ckpt", "tiny", "--port", "0"]
        with open(log, "wb") as out:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            while "listening at" not in (text := log.read_text()):
                if process.poll() is not None:
                    raise SystemExit(text)
                time.sleep(0.1)
            url = text.split("listening at ")[1].split()[0]
            if options.long_prompts:
                result = asyncio.run(measure_long_prompts(url, options))
            else:
                result = asyncio.run(measure(url, process.pid, options))
        finally:
            process.terminate()
            process.wait(60)
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks/serving.py", Options, work))
