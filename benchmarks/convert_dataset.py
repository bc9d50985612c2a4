"""Converts invented LLaVA-Med alignment records, beside a plain json.load loop.

    python benchmarks/convert_dataset.py [--records 100000 500000]

Ends with one JSON line: records a second and peak memory of both, for each number of records.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PICTURES = 2000

PLAIN = """
import json, sys
source, folder, target = sys.argv[1:]
import pathlib
with open(source) as file:
    records = json.load(file)
with open(target, "w") as out:
    for record in records:
        path = pathlib.Path(folder) / record["image"]
        if not path.is_file():
            raise SystemExit(f"no {path}")
        asked, answered = (turn["value"] for turn in record["conversatons"])
        text = "<image>" + asked.replace("<image>", "").strip() + "<reserved08706>" + answered
        row = {"text": text, "image_path": str(path), "id": record["id"]}
        row["domain"] = record["domain"]
        out.write(json.dumps(row, ensure_ascii=False) + "\\n")
"""


def invent(path: Path, folder: Path, count: int) -> None:
    """Records of the alignment file's shape, captions of 10 to 60 words, some of them not ASCII."""
    chooser = random.Random(0)
    words = [f"{a}{b}" for a in ("lung", "lesion", "axial", "größe", "stain") for b in range(40)]
    domains = ("chest_xray", "mri", "ct_scan", "histology", "gross")
    with open(path, "w", encoding="utf-8") as file:
        file.write("[")
        for number in range(count):
            caption = " ".join(chooser.choices(words, k=chooser.randint(10, 60)))
            record = {
                "id": f"{number}_F1", "image": f"{number % PICTURES}.png",
                "domain": {name: name == domains[number % 5] for name in domains},
                "conversatons": [
                    {"from": "human", "value": "Describe the picture.\n<image>"},
                    {"from": "gpt", "value": caption},
                ],
            }  # fmt: skip
            file.write(("," if number else "") + "\n" + json.dumps(record, ensure_ascii=False))
        file.write("\n]\n")


def measured(command: list[str]) -> dict[str, float]:
    """Seconds and peak memory (MB) of a process."""
    watch = (
        "import resource, subprocess, sys, time; t = time.monotonic(); "
        "code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
        "print(code, time.monotonic() - t, "
        "resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", watch, *command], capture_output=True, text=True, check=True
    )
    code, seconds, memory = done.stdout.split()
    if code != "0":
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stderr}")
    return {"seconds": float(seconds), "peak_mb": float(memory)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, nargs="+", default=[100_000, 500_000])
    options = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(PICTURES):
            Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(
                folder / f"{number}.png"
            )
        for count in options.records:
            source = folder / f"{count}.json"
            invent(source, folder, count)
            plain = [sys.executable, "-c", PLAIN, str(source), name, str(folder / "plain.jsonl")]
            ours = [sys.executable, "-m", "conversion.convert_dataset", "--from", "llava"]
            ours += ["--input", str(source), "--image_folder", name]
            ours += ["--output", str(folder / f"ours-{count}.jsonl")]
            runs = {"plain": measured(plain), "ours": measured(ours)}
            for run in runs.values():
                run["records_a_second"] = count / run["seconds"]
            with (
                open(folder / "plain.jsonl", encoding="utf-8") as one,
                open(folder / f"ours-{count}.jsonl", encoding="utf-8") as other,
            ):
                for left, right in zip(one, other, strict=True):
                    texts = [
                        json.loads(line)["text"].replace("<image>", "") for line in (left, right)
                    ]
                    assert texts[0] == texts[1], texts
            found[str(count)] = runs
            print(f"{count}: {runs}", flush=True)
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    print(json.dumps({"benchmark": "convert_dataset", "records": found, "machine": machine}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
