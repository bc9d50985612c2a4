"""What the embedded model can do, on phantoms that it has not seen, through the public commands.

    python benchmarks/tiny_skill.py [--ckpt tiny] [--scans 1000] [--pictures 300] [--layouts]

Questions go through `medley answer` and `medley evaluate vqa`; captions, follow-up turns, changes
and pictures through `medley generate`. Pictures are scored by what is measured in their pixels.
Baselines of the same run: the commonest answer of each question, pictures without guidance, and
pictures of a request that names nothing. `--layouts` asks the questions of the same model in
Hugging Face's layout, too, and as a base with an adapter. Ends with one JSON line.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

import medley
from medley.errors import UserError
from medley.options import run_program
from medley.phantoms import (
    CHANGED,
    Phantom,
    article,
    caption,
    change_document,
    change_text,
    facts,
    facts_told,
    follow_ups,
    measure,
    questions,
    request,
)

SEED = 20_000_000  # far from the seeds of training
NOTHING = "Show me a scan."
TORN = 0.05  # the residual of a drawn picture from which on it shows nothing rightly
RANK = 8  # of the adapter that is taken out of the model


@dataclass(frozen=True)
class Options:
    """Measures what the embedded model can do.

    Args:
        ckpt: checkpoint, or tiny
        scans: phantoms that are asked about
        questions: of each, drawn from all that can be asked about it alone
        pictures: pictures that are drawn, with and without guidance
        guidance: guidance scale of the words
        image_temperature: temperature of the pictures, guided or not
        layouts: also ask the questions in Hugging Face's layout, and of base and adapter
        keep: folder to keep all files in
    """

    ckpt: str = "tiny"
    scans: int = 1000
    questions: int = 10
    pictures: int = 300
    guidance: float = 2.0
    image_temperature: float = 0.4
    layouts: bool = False
    keep: Path | None = None


def run(*words: object) -> None:
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


GREEDY = ("--text_greedy", "--repetition_penalty", "1.0")


# --- questions --------------------------------------------------------------------------------


def write_questions(folder: Path, scans: Sequence[Phantom], most: int) -> Path:
    rng = np.random.default_rng(SEED + 2)
    rows = []
    for number, scan in enumerate(scans):
        pairs = questions(scan)
        for place in sorted(rng.permutation(len(pairs))[:most]):
            question, answer = pairs[place]
            kind = "CLOSED" if answer in ("yes", "no") else "OPEN"
            rows.append({
                "text": f"<image>{question}<reserved08706>{answer}", "id": len(rows),
                "image_path": str(folder / "pictures" / f"{number}.png"), "answer_type": kind,
                "modality": scan.modality,
            })  # fmt: skip
    return write_lines(folder / "questions.jsonl", rows)


def ask(ckpt: str, folder: Path, name: str, adapter: Path | None = None) -> dict[str, Any]:
    """Scores of `medley evaluate vqa`."""
    answers, scores = folder / f"{name}.answers.jsonl", folder / f"{name}.scores.json"
    asked = ("--format", "documents")
    more = ("--adapter", adapter) if adapter else ()
    run("medley.cli", "answer", "--ckpt", ckpt, *asked, "--questions", folder / "questions.jsonl",
        "--output", answers, "--max_new_tokens", 24, "--batch_size", 64,
        *GREEDY, *more)  # fmt: skip
    run("medley.cli", "evaluate", "vqa", *asked, "--gt", folder / "questions.jsonl",
        "--pred", answers, "--output", scores)  # fmt: skip
    found: dict[str, Any] = json.loads(scores.read_text())["scores"]
    return found


def question_scores(
    folder: Path, ckpt: str, name: str = "pth", adapter: Path | None = None
) -> dict[str, float]:
    """Closed and open questions of write_questions, in percent: of all, of those in each group, and
    what always saying the commonest answer to each question would give."""
    found = ask(ckpt, folder, name, adapter)
    rows = read_lines(folder / "questions.jsonl")
    pairs = [row["text"].removeprefix("<image>").split("<reserved08706>") for row in rows]
    scores: dict[str, float] = {}
    for kind, name in (("CLOSED", "closed accuracy"), ("OPEN", "open exact match")):
        own = [p for p, row in zip(pairs, rows, strict=True) if row["answer_type"] == kind]
        short = name.split()[0]
        scores[short] = found["all"][name]["percent"]
        scores[f"{short}_majority"] = majority(pairs, own)
        for group, values in found.items():
            if group != "all":
                scores[f"{short}_{group.split(': ')[1]}"] = values[name]["percent"]
    return scores


# --- words ------------------------------------------------------------------------------------


def generate(
    ckpt: str, folder: Path, name: str, rows: Sequence[dict[str, Any]], *more: object
) -> list[dict[str, Any]]:
    """Lines of responses.jsonl."""
    prompts = write_lines(folder / f"{name}.jsonl", rows)
    run("medley.cli", "generate", "--ckpt", ckpt, "--input", prompts, "--output", folder / name,
        "--batch_size", 64, *more)  # fmt: skip
    return read_lines(folder / name / "responses.jsonl")


def words(row: dict[str, Any]) -> str:
    return "".join(p["text"] for p in row["parts"] if p["type"] == "text").strip()


def agreement(gold: frozenset[str], said: frozenset[str]) -> float:
    """Share of the facts that were told and are right; what was made up counts against it."""
    return len(gold & said) / max(len(gold), len(said))


def told(ckpt: str, folder: Path, scans: Sequence[Phantom]) -> dict[str, float]:
    paths = [str(folder / "pictures" / f"{n}.png") for n in range(len(scans))]
    text = ("--mode", "text", "--max_new_tokens", 80, *GREEDY)
    asked = [{"text": "<image>Describe the picture.", "image_path": path} for path in paths]
    captions = list(map(words, generate(ckpt, folder, "captions", asked, *text)))
    pairs = [(facts_told(caption(scan)), facts_told(own))
             for scan, own in zip(scans, captions, strict=True)]  # fmt: skip
    rng = np.random.default_rng(SEED + 1)
    talks, golds = [], []
    for scan, path in zip(scans, paths, strict=True):
        for finding in scan.findings:
            question, answer = follow_ups(finding)[rng.integers(4)]
            talks.append({"messages": [
                {"role": "user", "content": f"<image>Is there {article(finding.kind)} "
                                            f"{finding.kind}?"},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": question},
            ], "image_path": path})  # fmt: skip
            golds.append((question, answer))
    followed = generate(ckpt, folder, "talks", talks, *text)
    later = [scan.later(rng) for scan in scans]
    rows: list[dict[str, Any]] = []
    changes = []
    for number, (path, (scan, change)) in enumerate(zip(paths, later, strict=True)):
        second = folder / "pictures" / f"{number}_later.png"
        Image.fromarray(scan.draw(64)).save(second)
        document = change_document(medley.Picture(path=path), medley.Picture(path=second), change)
        turn = "".join(p if isinstance(p, str) else "<image>" for p in document.turns[0].parts)
        rows.append({"text": turn, "image_path": [path, str(second)]})
        changes.append((CHANGED, change_text(change)))
    compared = generate(ckpt, folder, "changes", rows, *text)
    return {
        "caption_facts": 100 * float(np.mean([agreement(*pair) for pair in pairs])),
        "captions_word_for_word": 100 * float(np.mean(
            [caption(scan) == own for scan, own in zip(scans, captions, strict=True)]
        )),
        **shares("follow_up", golds, followed),
        **shares("changes", changes, compared),
    }  # fmt: skip


def shares(
    name: str, pairs: Sequence[tuple[str, str]], rows: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Questions and answers, and what was said to them: right in percent, and what always saying
    the commonest answer to each question would give."""
    right = [answer == words(row) for (_, answer), row in zip(pairs, rows, strict=True)]
    return {name: 100 * float(np.mean(right)), f"{name}_majority": majority(pairs, pairs)}


def majority(pairs: Sequence[tuple[str, str]], own: Sequence[tuple[str, str]]) -> float:
    """Percent of `own` that the commonest answer to each question of `pairs` gets right."""
    usual: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in pairs:
        usual[question][answer] += 1
    return 100 * float(np.mean([usual[q].most_common(1)[0][0] == a for q, a in own]))


# --- pictures ---------------------------------------------------------------------------------


def draw(options: Options, folder: Path, scans: Sequence[Phantom]) -> dict[str, float]:
    out: dict[str, float] = {}
    wanted: list[Callable[[Phantom], str]] = [request, request, lambda scan: NOTHING]
    names = ("", "_unguided", "_nothing_asked")
    for name, ask_for, scale in zip(names, wanted, (options.guidance, 1.0, 1.0), strict=True):
        rows = [{"text": ask_for(scan)} for scan in scans]
        found = generate(
            options.ckpt, folder, f"drawn{name}", rows, "--mode", "image", "--max_images", 1,
            "--guidance_scale_text", scale, "--image_temperature", options.image_temperature,
        )  # fmt: skip
        right: dict[str, list[bool]] = defaultdict(list)
        facets = ("modality", "organ", "kind", "side", "size", "all")
        for scan, row in zip(scans, found, strict=True):
            files = [part["file"] for part in row.get("parts", ()) if part["type"] == "image"]
            seen = None
            if files:
                seen = measure(np.asarray(Image.open(folder / f"drawn{name}" / files[0])))
            right["whole"].append(seen is not None and seen.residual < TORN)
            if seen is None or seen.residual >= TORN:  # none was drawn, or nothing that is a scan
                for facet in facets:
                    right[facet].append(False)
                continue
            told, there = scan.findings, seen.findings
            right["modality"].append(scan.modality == seen.modality)
            right["organ"].append(scan.organ == seen.organ)
            right["kind"].append({f.kind for f in told} == {f.kind for f in there})
            for value in ("side", "size"):
                pairs = [{(f.kind, getattr(f, value)) for f in own} for own in (told, there)]
                right[value].append(pairs[0] == pairs[1])
            gold = facts(scan.modality, scan.organ, told)
            right["all"].append(gold == facts(seen.modality, seen.organ, there))
        out |= {f"drawn_{key}{name}": 100 * float(np.mean(own)) for key, own in right.items()}
    return out


def reconstruct(ckpt: str, scans: Sequence[Phantom]) -> dict[str, float]:
    tokenizer = medley.ImageTokenizer.from_checkpoint(ckpt)
    psnr, kept = [], []
    for start in range(0, len(scans), 64):
        own = scans[start : start + 64]
        images = [scan.image(tokenizer.size) for scan in own]
        back = tokenizer.decode(tokenizer.encode(images))
        for scan, before, after in zip(own, images, back, strict=True):
            error = np.mean((np.asarray(before, float) - np.asarray(after, float)) ** 2)
            psnr.append(10 * np.log10(255**2 / error))
            kept.append(set(measure(np.asarray(after)).findings) == set(scan.findings))
    return {"psnr_db": float(np.mean(psnr)), "findings_kept_by_vqgan": 100 * float(np.mean(kept))}


# --- layouts ----------------------------------------------------------------------------------


def layouts(ckpt: str, folder: Path) -> Iterator[tuple[str, Path, Path | None]]:
    """The same model in Hugging Face's layout, and as a base with an adapter: what the adapter adds
    was taken from the base before. The base alone comes too, as the baseline of the last."""
    whole, lesser, adapter = folder / "hf", folder / "base", folder / "adapter"
    run("conversion.pth_to_bin", "--input_dir", ckpt, "--output_dir", whole)
    yield "hf", whole, None
    shutil.copytree(whole, lesser)
    tensors = load_file(whole / "model.safetensors")
    torch.manual_seed(SEED)
    learned: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        tensors[name] = tensor.float()
        if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")):
            up, down = (torch.randn(tensor.shape[0], RANK), torch.randn(RANK, tensor.shape[1]))
            up *= tensors[name].norm() / (up @ down).norm()
            tensors[name] = tensors[name] - up @ down
            own = f"base_model.model.{name.removesuffix('.weight')}"
            learned |= {f"{own}.lora_A.weight": down, f"{own}.lora_B.weight": up}
    save_file(tensors, lesser / "model.safetensors", {"format": "pt"})
    config = json.loads((lesser / "config.json").read_text()) | {"dtype": "float32"}
    (lesser / "config.json").write_text(json.dumps(config))
    adapter.mkdir()
    save_file(learned, adapter / "adapter_model.safetensors", {"format": "pt"})
    LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj", "down_proj"],
        base_model_name_or_path=str(lesser), task_type="CAUSAL_LM",
    ).save_pretrained(adapter)  # fmt: skip
    yield "adapter", lesser, adapter
    yield "base_without_adapter", lesser, None


def work(options: Options) -> None:
    start = time.monotonic()
    rng = np.random.default_rng(SEED)
    scans = [Phantom.random(rng) for _ in range(options.scans)]
    with TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--keep {folder}: not empty; what lies there would be taken for this")
        (folder / "pictures").mkdir(parents=True)
        for number, scan in enumerate(scans):
            scan.image(64).save(folder / "pictures" / f"{number}.png")
        write_questions(folder, scans, options.questions)
        result: dict[str, object] = {
            **reconstruct(options.ckpt, scans),
            **question_scores(folder, options.ckpt),
            **told(options.ckpt, folder, scans),
            **draw(options, folder, scans[: options.pictures]),
        }
        if options.layouts:
            for name, base, adapter in layouts(options.ckpt, folder):
                found = ask(str(base), folder, name, adapter)["all"]
                result[f"closed_{name}"] = found["closed accuracy"]["percent"]
                result[f"open_{name}"] = found["open exact match"]["percent"]
    result |= {
        "scans": options.scans, "questions": options.questions, "pictures": options.pictures,
        "guidance": options.guidance, "image_temperature": options.image_temperature,
        "seconds": time.monotonic() - start, "machine": platform.machine(),
    }  # fmt: skip
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks/tiny_skill.py", Options, work))
