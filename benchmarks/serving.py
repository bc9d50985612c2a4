"""The server under load: 32 clients at once beside the same requests one after another.

    python benchmarks/serving.py

One process of `medley serve --ckpt tiny` on the loopback; requests of mixed modes (a question about
a picture, a text, a picture from words). Baseline: the same requests, one after another, to the
same server. Then the first text token with 8 clients at work beside an idle server's, and the
memory over many requests, none of which may be lost. Ends with one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
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
from medley.serving.untrusted_inputs import data_address
from medley.utils.cli_options import run_program

ROOT = Path(__file__).resolve().parents[1]
SLICES = 8  # of the many requests, behind each of which memory is read


@dataclass(frozen=True)
class Options:
    """Measures the server.

    Args:
        clients: that ask at once
        requests: of the comparison
        many: requests over which memory has to be flat
        tokens: of a text
    """

    clients: int = 32
    requests: int = 96
    many: int = 2000
    tokens: int = 48


def bodies(options: Options) -> list[dict[str, Any]]:
    pictures = [data_address(Phantom(m, "head", seed=i).image(64))
                for i, m in enumerate(("CT", "MR", "X-ray"))]  # fmt: skip
    found = []
    for number in range(options.requests):
        kind = number % 3
        text, parts = ("Describe the picture.", "Write a report.")[number % 2], []
        if kind == 0:
            url = pictures[number % len(pictures)]
            parts = [{"type": "image_url", "image_url": {"url": url}}]
        body = {"model": "tiny", "seed": number, "max_tokens": options.tokens, "mode": "text"}
        if kind == 2:
            text = "Show me a CT scan of the head."
            body |= {"mode": "image", "max_tokens": 200}
        content = [*parts, {"type": "text", "text": text}]
        found.append(body | {"messages": [{"role": "user", "content": content}]})
    return found


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    answer = await client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    message = answer.json()["choices"][0]["message"]
    return json.dumps([message["content"], message.get("images")])


async def at_once(
    client: httpx.AsyncClient, todo: list[dict[str, Any]], clients: int
) -> tuple[list[str], float]:
    """Answers in order, and seconds, with so many under way."""
    gate = asyncio.Semaphore(clients)

    async def one(body: dict[str, Any]) -> str:
        async with gate:
            return await ask(client, body)

    start = time.perf_counter()
    found = await asyncio.gather(*(one(body) for body in todo))
    return list(found), time.perf_counter() - start


async def first_token(client: httpx.AsyncClient, body: dict[str, Any]) -> float:
    start = time.perf_counter()
    asked = body | {"stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
        async for line in answer.aiter_lines():
            if '"content": "' in line and '"content": ""' not in line:
                return time.perf_counter() - start
    return time.perf_counter() - start


async def measure(address: str, pid: int, options: Options) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        todo = bodies(options)
        await at_once(client, todo[:12], 4)  # caches grow
        alone, seconds_alone = await at_once(client, todo, 1)
        together, seconds_together = await at_once(client, todo, options.clients)
        text = next(body for body in todo if body["mode"] == "text")
        idle = statistics.median([await first_token(client, text) for _ in range(15)])
        busy = asyncio.create_task(at_once(client, todo * 2, 7))
        await asyncio.sleep(0.5)
        loaded = []
        while not busy.done() and len(loaded) < 15:
            loaded.append(await first_token(client, text))
        await busy
        many = (todo * (1 + options.many // len(todo)))[: options.many]
        answers: list[str] = []
        seconds, memories = 0.0, [memory(pid)]
        for start in range(0, len(many), len(many) // SLICES):
            found, took = await at_once(
                client, many[start : start + len(many) // SLICES], options.clients
            )
            answers, seconds = answers + found, seconds + took
            memories.append(memory(pid))
    return {
        "benchmark": "serving", "clients": options.clients, "requests": len(todo),
        "seconds_one_after_another": seconds_alone, "seconds_together": seconds_together,
        "times_the_throughput": seconds_alone / seconds_together,
        "same_answers": sum(a == b for a, b in zip(alone, together, strict=True)) / len(todo),
        "first_token_idle": idle, "first_token_8_clients": statistics.median(loaded),
        "times_the_idle_first_token": statistics.median(loaded) / idle,
        "many": len(answers), "lost": options.many - len(answers),
        "requests_per_second": len(answers) / seconds,
        "memory_mb": memories,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }  # fmt: skip


def memory(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def work(options: Options) -> None:
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "medley.cli", "serve", "--ckpt", "tiny", "--port", "0"]
        with open(log, "wb") as out:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            while "listening at" not in (text := log.read_text()):
                if process.poll() is not None:
                    raise SystemExit(text)
                time.sleep(0.1)
            address = text.split("listening at ")[1].split()[0]
            result = asyncio.run(measure(address, process.pid, options))
        finally:
            process.terminate()
            process.wait(60)
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks/serving.py", Options, work))
