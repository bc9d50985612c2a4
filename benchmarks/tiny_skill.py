"""What the embedded model can do, on phantoms that it has not seen.

    python benchmarks/tiny_skill.py [--ckpt tiny] [--scans 100]

Baselines of the same run: for questions the majority answer of each, for pictures a request
that names nothing ("Show me a scan."). Ends with one JSON line.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

import medley
from medley.generation import GenerationOptions
from medley.options import run_program
from medley.phantoms import MODALITIES, Phantom, measure, questions, request

SEED = 20_000_000  # far from the seeds of training


@dataclass(frozen=True)
class Options:
    """Measures what the embedded model can do.

    Args:
        ckpt: checkpoint, or tiny
        scans: phantoms that questions are asked about
        pictures: pictures that are drawn
        guidance: guidance scale of the words
    """

    ckpt: str = "tiny"
    scans: int = 100
    pictures: int = 60
    guidance: float = 3.0


def ask(model: medley.Model, scans: list[Phantom]) -> dict[str, float]:
    """Exact answers, closed and open, and those of always giving the commonest answer."""
    options = GenerationOptions(
        mode="text", text_greedy=True, repetition_penalty=1.0, max_new_tokens=24
    )
    size = model.image_tokenizer.size
    prompts, gold, asked = [], [], []
    for scan in scans:
        picture = model.with_codes(medley.Picture(image=scan.image(size)))
        for question, answer in questions(scan):
            prompts.append([picture, question])
            gold.append(answer)
            asked.append(question)
    answers = model.answer_batch(prompts, [options] * len(prompts), batch_size=64)
    commonest: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in zip(asked, gold, strict=True):
        commonest[question][answer] += 1
    hits: dict[str, list[bool]] = defaultdict(list)
    for question, answer, found in zip(asked, gold, answers, strict=True):
        kind = "closed" if answer in ("yes", "no") else "open"
        hits[kind].append(found.text.strip() == answer)
        hits[f"{kind}_majority"].append(commonest[question].most_common(1)[0][0] == answer)
    return {name: float(np.mean(own)) for name, own in hits.items()}


def draw(model: medley.Model, scans: list[Phantom], guidance: float) -> dict[str, float]:
    """Shares of drawn pictures in which modality, side and everything is as asked for."""
    options = GenerationOptions(mode="image", guidance_scale_text=guidance, max_images=1)
    out: dict[str, float] = {}
    for name, texts in (
        ("", [request(scan) for scan in scans]),
        ("_nothing_asked", ["Show me a scan."] * len(scans)),
    ):
        answers = model.answer_batch([[t] for t in texts], [options] * len(texts), batch_size=16)
        found = [measure(np.asarray(answer.images[0]), MODALITIES) for answer in answers]
        pairs = list(zip(scans, found, strict=True))
        places = [{(f.side, f.level) for f in x.findings} for pair in pairs for x in pair]
        out[f"drawn_modality{name}"] = float(np.mean([s.modality == f.modality for s, f in pairs]))
        out[f"drawn_organ{name}"] = float(np.mean([s.organ == f.organ for s, f in pairs]))
        out[f"drawn_side{name}"] = float(
            np.mean(
                [{x.side for x in s.findings} == {x.side for x in f.findings} for s, f in pairs]
            )
        )
        out[f"drawn_place{name}"] = float(
            np.mean([a == b for a, b in zip(places[::2], places[1::2], strict=True)])
        )
        out[f"drawn_findings{name}"] = float(
            np.mean([set(s.findings) == set(f.findings) for s, f in pairs])
        )
    return out


def reconstruct(model: medley.Model, scans: list[Phantom]) -> dict[str, float]:
    size = model.image_tokenizer.size
    images = [scan.image(size) for scan in scans]
    back = model.image_tokenizer.decode(model.image_tokenizer.encode(images))
    psnr, kept = [], []
    for scan, before, after in zip(scans, images, back, strict=True):
        error = np.mean((np.asarray(before, float) - np.asarray(after, float)) ** 2)
        psnr.append(10 * np.log10(255**2 / error))
        kept.append(set(measure(np.asarray(after), MODALITIES).findings) == set(scan.findings))
    return {"psnr_db": float(np.mean(psnr)), "findings_kept_by_vqgan": float(np.mean(kept))}


def work(options: Options) -> None:
    start = time.monotonic()
    model = medley.load(options.ckpt)
    rng = np.random.default_rng(SEED)
    scans = [Phantom.random(rng, MODALITIES) for _ in range(options.scans)]
    wanted: list[Phantom] = []
    while len(wanted) < options.pictures:
        scan = Phantom.random(rng, MODALITIES)
        if len(scan.findings) == 1:
            wanted.append(scan)
    result: dict[str, object] = {
        **reconstruct(model, scans),
        **ask(model, scans),
        **draw(model, wanted, options.guidance),
        "scans": options.scans,
        "pictures": options.pictures,
        "guidance": options.guidance,
        "seconds": time.monotonic() - start,
        "machine": f"{platform.machine()}, {model.engine.device}",
    }
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks/tiny_skill.py", Options, work))
