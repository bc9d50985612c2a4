"""What the embedded model can do, on phantoms that it has not seen, through the public commands.

    python benchmarks/tiny_skill.py [--ckpt tiny] [--scans 1000] [--layouts false]

Questions go through `medley answer` and `medley evaluate vqa`; captions, talks, changes and
pictures through `medley generate`. Pictures are scored by what is measured in their pixels. The
world is finite, so that most of what a new scan shows was shown by some scan of the training:
scores of scans that show what none did are given apart, as `_new`.

Baselines of the same run: the commonest answer of each question, captions without findings,
pictures without guidance, with the commands' own settings, and of a request that names nothing.
`--layouts` asks for the same of the same model in Hugging Face's layout, and of a base with an
adapter. Every part's scores are printed when it ends; the last line has all of them, as JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from phantom_questions import (
    GREEDY,
    Model,
    Pair,
    Result,
    majority,
    question_majorities,
    question_scores,
    read_lines,
    run,
    work_folder,
    write_lines,
    write_questions,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import medley
from medley.checkpoints.checkpoint import tiny_folder
from medley.generation import GenerationOptions
from medley.phantoms import (
    CHANGED,
    KINDS,
    Measurement,
    Phantom,
    article,
    caption,
    change_document,
    change_text,
    facts,
    facts_in,
    follow_up_questions,
    measure,
    prompt_for,
    questions,
)
from medley.phantoms.lessons import learned_descriptions
from medley.utils.cli_options import run_program

SEED = 40_000_000  # far from the seeds of training, and of what settings were chosen with
NOTHING = "Show me a scan."
TORN = 0.07  # the residual of a picture from which on it shows nothing rightly
RANK = 8  # of the adapter that is taken out of the model
TURNS = 3  # of a talk
Scores = dict[str, float]


@dataclass(frozen=True)
class Options:
    """Measures what the embedded model can do.

    Args:
        ckpt: checkpoint in Chameleon's layout, or tiny
        scans: phantoms that are asked about
        questions: of each, drawn from all that can be asked about it alone
        pictures: pictures that are drawn, with and without guidance
        guidance: guidance scale of the words
        image_temperature: temperature of the pictures, guided or not
        layouts: also measure it in Hugging Face's layout, and as a base with an adapter
        keep: empty folder to keep all files in
        seed: seed of the phantoms
    """

    ckpt: str = "tiny"
    scans: int = 1000
    questions: int = 5
    pictures: int = 1000
    guidance: float = 1.5
    image_temperature: float = 0.2
    layouts: bool = True
    keep: Path | None = None
    seed: int = SEED


def percent(hits: Sequence[bool]) -> float:
    return 100 * sum(hits) / max(len(hits), 1)


# --- words ------------------------------------------------------------------------------------


def generate(
    model: Model, folder: Path, name: str, rows: Sequence[dict[str, Any]], *more: object
) -> list[dict[str, Any]]:
    """Lines of responses.jsonl."""
    name = f"{model.name}-{name}"
    prompts = write_lines(folder / f"{name}.jsonl", rows)
    run("medley.cli", "generate", *model.words, "--input", prompts, "--output", folder / name,
        "--batch_size", 64, *more)  # fmt: skip
    return read_lines(folder / name / "responses.jsonl")


def say(model: Model, folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    text = ("--mode", "text", "--max_new_tokens", 80, *GREEDY)
    return [
        "".join(part["text"] for part in row["parts"] if part["type"] == "text").strip()
        for row in generate(model, folder, name, rows, *text)
    ]


def agreement(gold: frozenset[str], said: frozenset[str]) -> float:
    """Share of the facts that were told and are right; what was made up counts against it."""
    return len(gold & said) / max(len(gold), len(said))


def captions(model: Model, folder: Path, scans: Sequence[Phantom], new: Sequence[bool]) -> Scores:
    rows = [{"text": "<image>Describe the picture.", "image_path": picture(folder, number)}
            for number in range(len(scans))]  # fmt: skip
    said = say(model, folder, "captions", rows)
    golds = [caption(scan) for scan in scans]
    shares = [agreement(facts_in(g), facts_in(s)) for g, s in zip(golds, said, strict=True)]
    empty = [caption(replace(scan, findings=())) for scan in scans]
    usual = [agreement(facts_in(g), facts_in(s)) for g, s in zip(golds, empty, strict=True)]
    of_new = [share for share, own in zip(shares, new, strict=True) if own]
    return {
        "caption_facts": 100 * float(np.mean(shares)),
        **({"caption_facts_new": 100 * float(np.mean(of_new))} if of_new else {}),
        "caption_facts_without_findings": 100 * float(np.mean(usual)),
        "captions_word_for_word": percent([g == s for g, s in zip(golds, said, strict=True)]),
    }  # fmt: skip


def picture(folder: Path, number: int) -> str:
    return str(folder / "pictures" / f"{number}.png")


def talk_pairs(scan: Phantom, rng: np.random.Generator) -> list[Pair]:
    """Whether there is a kind of finding, which may be; what goes on from that, if there is; and
    anything else."""
    kind = KINDS[rng.integers(len(KINDS))]
    pairs = questions(scan)
    own = [finding for finding in scan.findings if finding.kind == kind]
    more = follow_up_questions(own[0]) if own else pairs
    first = (f"Is there {article(kind)} {kind}?", "yes" if own else "no")
    return [first, more[rng.integers(len(more))], pairs[rng.integers(len(pairs))]]


def talks(model: Model, folder: Path, scans: Sequence[Phantom], seed: int) -> Scores:
    """Every turn stands behind what the model itself said before. `follow_up` is of second turns
    that make sense behind the first alone, about scans with several findings."""
    rng = np.random.default_rng(seed)
    golds = [talk_pairs(scan, rng) for scan in scans]
    messages: list[list[dict[str, str]]] = [[] for _ in scans]
    right: list[list[bool]] = []
    for turn in range(TURNS):
        for number, own in enumerate(messages):
            mark = "" if turn else "<image>"
            own.append({"role": "user", "content": mark + golds[number][turn][0]})
        rows = [{"messages": own, "image_path": picture(folder, number)}
                for number, own in enumerate(messages)]  # fmt: skip
        said = say(model, folder, f"turn{turn}", rows)
        for own, answer in zip(messages, said, strict=True):
            own.append({"role": "assistant", "content": answer})
        right.append([pairs[turn][1] == s for pairs, s in zip(golds, said, strict=True)])
    going_on = [
        number for number, scan in enumerate(scans)
        if golds[number][0][1] == "yes" and len(scan.findings) > 1
    ]  # fmt: skip
    found = {f"turn_{turn + 1}": percent(hits) for turn, hits in enumerate(right)}
    found["whole_talks"] = percent([all(hits) for hits in zip(*right, strict=True)])
    found["follow_up"] = percent([right[1][number] for number in going_on])
    found["follow_up_majority"] = majority([golds[number][1] for number in going_on])
    return found


def changes(model: Model, folder: Path, scans: Sequence[Phantom], seed: int) -> Scores:
    """Two pictures, and what has changed."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    golds = []
    for number, scan in enumerate(scans):
        second, change = scan.later(rng)
        paths = [picture(folder, number), str(folder / "pictures" / f"{number}_later.png")]
        second.image(64).save(paths[1])
        before, after = (medley.Picture(path=path) for path in paths)
        turn = change_document(before, after, change).turns[0]
        text = "".join(part if isinstance(part, str) else "<image>" for part in turn.parts)
        rows.append({"text": text, "image_path": paths})
        golds.append(change_text(change))
    said = say(model, folder, "changes", rows)
    return {
        "changes": percent([g == s for g, s in zip(golds, said, strict=True)]),
        "changes_majority": majority([(CHANGED, gold) for gold in golds]),
    }


# --- pictures ---------------------------------------------------------------------------------


def facets(scan: Phantom, seen: Measurement | None) -> dict[str, bool]:
    """What of a scan is right in a picture; nothing is in one that is torn, or was not drawn."""
    if seen is None or seen.residual >= TORN:
        return dict.fromkeys(("whole", "modality", "organ", *_OF_FINDINGS, "all"), False)
    found = {"whole": True, "modality": scan.modality == seen.modality,
             "organ": scan.organ == seen.organ}  # fmt: skip
    for name, fields in _OF_FINDINGS.items():
        one, other = ({tuple(getattr(f, field) for field in fields) for f in s.findings}
                      for s in (scan, seen))  # fmt: skip
        found[name] = one == other
    gold = facts(scan.modality, scan.organ, scan.findings)
    found["all"] = gold == facts(seen.modality, seen.organ, seen.findings)
    return found


_OF_FINDINGS = {
    "kind": ("kind",), "kind_and_side": ("kind", "side"), "kind_and_level": ("kind", "level"),
    "kind_and_size": ("kind", "size"), "kind_and_brightness": ("kind", "brightness"),
}  # fmt: skip


def drawn(
    model: Model, folder: Path, name: str, scans: Sequence[Phantom], asked: Sequence[str],
    guidance: float, temperature: float,
) -> list[dict[str, bool]]:  # fmt: skip
    """What is right in each picture that the model draws."""
    found = []
    rows = generate(
        model, folder, name, [{"text": text} for text in asked], "--mode", "image",
        "--max_images", 1, "--guidance_scale_text", guidance, "--image_temperature", temperature,
    )  # fmt: skip
    for scan, row in zip(scans, rows, strict=True):
        files = [part["file"] for part in row.get("parts", ()) if part["type"] == "image"]
        seen = None
        if files:
            seen = measure(np.asarray(Image.open(folder / f"{model.name}-{name}" / files[0])))
        found.append(facets(scan, seen))
    return found


def guided(
    model: Model, folder: Path, scans: Sequence[Phantom], new: Sequence[bool], options: Options
) -> Scores:
    asked = [prompt_for(scan) for scan in scans]
    found = drawn(
        model, folder, "guided", scans, asked, options.guidance, options.image_temperature
    )
    scores = {f"drawn_{name}": percent([own[name] for own in found]) for name in found[0]}
    own = [f["all"] for f, n in zip(found, new, strict=True) if n]
    return scores | ({"drawn_all_new": percent(own)} if own else {})


def otherwise_drawn(
    model: Model, folder: Path, scans: Sequence[Phantom], options: Options
) -> Scores:
    asked, nothing = [prompt_for(scan) for scan in scans], [NOTHING] * len(scans)
    usual = GenerationOptions()
    ways = {
        "unguided": (asked, 1.0, options.image_temperature),
        "by_default": (asked, usual.guidance_scale_text, usual.image_temperature),
        "nothing_asked": (nothing, 1.0, options.image_temperature),
    }
    return {
        f"drawn_all_{name}": percent(
            [own["all"] for own in drawn(model, folder, name, scans, *way)]
        )
        for name, way in ways.items()
    }


def reconstructed(ckpt: str, scans: Sequence[Phantom]) -> Scores:
    """How fast scans are drawn, what the reader finds in them, and in what the VQGAN makes of
    them: the most that drawn pictures can have right."""
    tokenizer = medley.ImageTokenizer.from_checkpoint(ckpt)
    start = time.perf_counter()
    images = [scan.image(tokenizer.size) for scan in scans]
    speed = len(scans) / (time.perf_counter() - start)
    psnr, kept, read = [], [], []
    for number in range(0, len(scans), 64):
        part = slice(number, number + 64)
        back = tokenizer.decode(tokenizer.encode(images[part]))
        for scan, before, after in zip(scans[part], images[part], back, strict=True):
            one, other = np.asarray(before), np.asarray(after)
            psnr.append(10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2)))
            read.append(facets(scan, measure(one))["all"])
            kept.append(facets(scan, measure(other))["all"])
    return {
        "scans_a_second": speed, "read_rightly": percent(read), "psnr_db": float(np.mean(psnr)),
        "reconstructed_all": percent(kept),
    }  # fmt: skip


# --- layouts ----------------------------------------------------------------------------------


def layouts(ckpt: str, folder: Path) -> Iterator[Model]:
    """The same model in Hugging Face's layout, and as a base with an adapter: what the adapter adds
    was taken from the base before. The base alone comes too, as the baseline of the last."""
    whole, lesser, adapter = folder / "hf", folder / "base", folder / "adapter"
    run("conversion.pth_to_bin", "--input_dir", ckpt, "--output_dir", whole)
    yield Model("hf", str(whole))
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
    yield Model("adapter", str(lesser), adapter)
    yield Model("base_without_adapter", str(lesser))


# --- all of it --------------------------------------------------------------------------------


def shown_by_no_training(ckpt: str, scans: Sequence[Phantom]) -> list[bool]:
    """Of each scan; none of a model that did not keep how it was made."""
    log = (tiny_folder() if ckpt == "tiny" else Path(ckpt)) / "training_log.json"
    if not log.exists():
        return [False] * len(scans)
    made = json.loads(log.read_text())
    learned = learned_descriptions(made["options"]["seed"], made["chunks"])
    return [scan.description not in learned for scan in scans]


def work(options: Options) -> None:
    start = time.monotonic()
    rng = np.random.default_rng(options.seed)
    scans = [Phantom.random(rng) for _ in range(options.scans)]
    new = shown_by_no_training(options.ckpt, scans)
    groups = [{"modality": scan.modality, "shown": "new" if own else "before"}
              for scan, own in zip(scans, new, strict=True)]  # fmt: skip
    pictures = min(options.pictures, len(scans))
    result = Result({
        "benchmark": "tiny_skill", "ckpt": options.ckpt, "scans": options.scans,
        "shown_by_no_training": sum(new), "questions": options.questions, "pictures": pictures,
        "guidance": options.guidance, "image_temperature": options.image_temperature,
    })  # fmt: skip
    with work_folder(options.keep) as folder:
        write_questions(folder, scans, options.questions, options.seed + 2, groups)
        model = Model("pth", options.ckpt)
        result.keep(reconstructed(options.ckpt, scans))
        result.keep(question_scores(folder, model) | question_majorities(folder))
        result.keep(captions(model, folder, scans, new))
        result.keep(talks(model, folder, scans, options.seed + 1))
        result.keep(changes(model, folder, scans, options.seed + 3))
        result.keep(guided(model, folder, scans[:pictures], new[:pictures], options))
        result.keep(otherwise_drawn(model, folder, scans[:pictures], options))
        for other in layouts(options.ckpt, folder) if options.layouts else ():
            name = f"_{other.name}"
            result.keep(question_scores(folder, other), name)
            if name != "_base_without_adapter":
                result.keep(captions(other, folder, scans, new), name)
                result.keep(talks(other, folder, scans, options.seed + 1), name)
                result.keep(changes(other, folder, scans, options.seed + 3), name)
                result.keep(guided(other, folder, scans[:pictures], new[:pictures], options), name)
    result["seconds"] = round(time.monotonic() - start, 1)
    result.end()


if __name__ == "__main__":
    sys.exit(run_program("benchmarks/tiny_skill.py", Options, work))
