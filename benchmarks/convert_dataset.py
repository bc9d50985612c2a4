"""Speed of converting LLaVA-Med alignment records, compared with a plain json.load loop.

    python benchmarks/convert_dataset.py [--records 100000 500000]

The records are synthetic. Ends with one JSON line: records per second and peak memory of both, for
each number of records.
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

IMAGES = 2000

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
            raise SystemExit(f"{path} is missing")
        question, answer = (turn["value"] for turn in record["conversatons"])
        text = "<image>" + question.replace("<image>", "").strip() + "<reserved08706>" + answer
        row = {"text": text, "image_path": str(path), "id": record["id"]}
        row["domain"] = record["domain"]
        out.write(json.dumps(row, ensure_ascii=False) + "\\n")
"""


def write_records(path: Path, folder: Path, count: int) -> None:
    """Records in the alignment file's format, with captions of 10 to 60 words, partly not ASCII."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("lung", "lesion", "axial", "größe", "stain") for b in range(40)]
    domains = ("chest_xray", "mri", "ct_scan", "histology", "gross")
    with open(path, "w", encoding="utf-8") as file:
        file.write("[")
        for number in range(count):
            caption = " ".join(rng.choices(words, k=rng.randint(10, 60)))
            record = {
                "id": f"{number}_F1", "image": f"{number % IMAGES}.png",
                "domain": {name: name == domains[number % 5] for name in domains},
                "conversatons": [
                    {"from": "human", "value": "Describe the image.\n<image>"},
                    {"from": "gpt", "value": caption},
                ],
            }  # fmt: skip
            file.write(("," if number else "") + "\n" + json.dumps(record, ensure_ascii=False))
        file.write("\n]\n")


def measure(command: list[str]) -> dict[str, float]:
    """Seconds and peak memory (MB) of a process."""
    code = (
        "import resource, subprocess, sys, time; t = time.monotonic(); "
        "status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
        "print(status, time.monotonic() - t, "
        "resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    status, seconds, memory = done.stdout.split()
    if status != "0":
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stderr}")
    return {"seconds": float(seconds), "peak_mb": float(memory)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, nargs="+", default=[100_000, 500_000])
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(IMAGES):
            Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(
                folder / f"{number}.png"
            )
        for count in options.records:
            source = folder / f"{count}.json"
            write_records(source, folder, count)
            plain = [sys.executable, "-c", PLAIN, str(source), name, str(folder / "plain.jsonl")]
            ours = [sys.executable, "-m", "medley", "convert", "--from", "llava"]
            ours += ["--input", str(source), "--image_folder", name]
            ours += ["--output", str(folder / f"ours-{count}.jsonl")]
            runs = {"plain": measure(plain), "ours": measure(ours)}
            for run in runs.values():
                run["records_a_second"] = count / run["seconds"]
            with (
                open(folder / "plain.jsonl", encoding="utf-8") as baseline,
                open(folder / f"ours-{count}.jsonl", encoding="utf-8") as converted,
            ):
                for left, right in zip(baseline, converted, strict=True):
                    texts = [
                        json.loads(line)["text"].replace("<image>", "") for line in (left, right)
                    ]
                    assert texts[0] == texts[1], texts
            results[str(count)] = runs
            print(f"{count}: {runs}", flush=True)
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    print(json.dumps({"benchmark": "convert_dataset", "records": results, "machine": machine}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
