"""Pictures to codes: ours beside transformers' ChameleonVQVAE, on Chameleon's own sizes.

    python benchmarks/image_tokenization.py --pictures ../shared/data/vqa_rad/images --limit 24

Baseline: transformers' ChameleonVQVAE in float32, pictures prepared with PIL in the same process,
one by one in a loop as MedMax does. Ours: `torchrun -m tokenizer.image_tokenization`, a rank for
every core (or GPU), timed from its first picture to its last shard; starting Python and loading
weights is left out on both sides. Codes are compared one by one; a code that differs where the
two nearest codes are about equally near is counted as a near tie. TF32 is off in both.
`--rows` measures peak memory over so many rows with a small network instead.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image

from medley.images.preprocess import open_image
from medley.utils.cli_options import run_program
from medley.vqgan import VQGAN, VQGANConfig
from medley.vqgan.files import to_hugging_face_config, write_vqgan
from medley.vqgan.image_tokenizer import ImageTokenizer

ROOT = Path(__file__).resolve().parents[1]
CHAMELEON = VQGANConfig(128, (1, 1, 2, 2, 4), 2, 512, 256, 256, 8192)
SMALL = VQGANConfig(32, (1, 1), 1, 16, 8, 8, 64)


@dataclass(frozen=True)
class Options:
    """Measures tokenizer.image_tokenization against transformers.

    Args:
        pictures: folder of pictures
        limit: use so many of them
        ranks: processes of ours; one for every core, or GPU, if not given
        trained: another checkpoint, whose share of equal codes in bfloat16 is printed too
        compile: compile ours
        rows: measure peak memory over so many rows instead
    """

    pictures: Path
    limit: int = 24
    ranks: int | None = None
    trained: str = "tiny"
    compile: bool = False
    rows: list[int] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    return run_program("benchmarks/image_tokenization.py", Options, work, argv)


def work(options: Options) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = memory(options, folder) if options.rows else speed(options, folder, device)
    hardware = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    result |= {"machine": f"{hardware or platform.machine()}, {os.cpu_count()} cores"}
    print(json.dumps(result))


def random_checkpoint(folder: Path, config: VQGANConfig) -> Path:
    """A folder that has only a VQGAN, with random weights."""
    torch.manual_seed(0)
    write_vqgan(folder / "ckpt" / "tokenizer", VQGAN(config), "crop")
    return folder / "ckpt"


def speed(options: Options, folder: Path, device: str) -> dict[str, Any]:
    ckpt = random_checkpoint(folder, CHAMELEON)
    paths = sorted(str(p) for p in options.pictures.iterdir())[: options.limit]
    (folder / "list.csv").write_text("img_path\n" + "".join(f"{p}\n" for p in paths))
    ranks = options.ranks or torch.cuda.device_count() or os.cpu_count() or 1
    expected, seconds = baseline(ckpt, paths, device)
    print(f"transformers, float32, one by one: {seconds / len(paths):.2f} s a picture")
    result: dict[str, Any] = {
        "benchmark": "image_tokenization", "pictures": len(paths), "ranks": ranks, "device": device,
        "baseline_s_per_picture": seconds / len(paths),
    }  # fmt: skip
    tokenizer = ImageTokenizer.from_checkpoint(ckpt)
    for dtype in ("float32", "bfloat16"):
        codes, took = ours(options, folder, ckpt, dtype, ranks, len(paths))
        different = np.argwhere(codes != expected)
        ties = near_ties(tokenizer, paths, different) if dtype == "float32" else 0
        result |= {
            f"{dtype}_s_per_picture": took / len(paths),
            f"{dtype}_times_faster": seconds / took,
            f"{dtype}_equal_codes": float((codes == expected).mean()),
            f"{dtype}_codes_that_differ": len(different),
            f"{dtype}_near_ties_among_them": ties,
        }
        print(f"ours, {dtype}: {took / len(paths):.2f} s a picture, {seconds / took:.2f} times")
    trained = [
        ImageTokenizer.from_checkpoint(options.trained, dtype=dtype).encode(images(paths))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    result["bfloat16_equal_codes_trained"] = float((trained[0] == trained[1]).float().mean())
    result |= decoding(tokenizer, expected[:2])
    return result


def images(paths: list[str]) -> list[Image.Image]:
    return [open_image(path) for path in paths]


def baseline(ckpt: Path, paths: list[str], device: str) -> tuple[np.ndarray[Any, Any], float]:
    """transformers' encoder in a loop, after one picture to warm up."""
    ours = VQGAN(CHAMELEON)
    ours.load_state_dict(torch.load(ckpt / "tokenizer/vqgan.ckpt", weights_only=True)["state_dict"])
    fields = transformers.ChameleonVQVAEConfig(**to_hugging_face_config(CHAMELEON))
    theirs = transformers.ChameleonVQVAE._from_config(fields)
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "decoder." not in k})
    theirs = theirs.eval().to(device)
    torch.backends.cudnn.allow_tf32 = False

    def encode(path: str) -> list[int]:
        image = Image.open(path).convert("RGB")
        scale = CHAMELEON.resolution / min(image.size)
        size = (round(scale * image.width), round(scale * image.height))
        image = image.resize(size, Image.Resampling.LANCZOS)
        left, top = ((length - CHAMELEON.resolution) // 2 for length in size)
        side = CHAMELEON.resolution
        array = np.asarray(image.crop((left, top, left + side, top + side))) / 255.0 * 2 - 1
        pixels = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            return theirs.encode(pixels.to(device)).image_tokens.reshape(-1).tolist()

    encode(paths[0])
    start = time.perf_counter()
    codes = np.array([encode(path) for path in paths])
    return codes, time.perf_counter() - start


def ours(
    options: Options, folder: Path, ckpt: Path, dtype: str, ranks: int, pictures: int
) -> tuple[np.ndarray[Any, Any], float]:
    """The program as it is run by people; its own clock, without the start of Python."""
    output = folder / dtype
    done = launch(ranks, [
        "--input", folder / "list.csv", "--output", output, "--ckpt", ckpt, "--dtype", dtype,
        "--bs", 4 if not torch.cuda.is_available() else 64,
        "--partition_size", max(1, -(-pictures // ranks)),
        *(["--compile"] if options.compile else []),
    ])  # fmt: skip
    found: dict[str, list[int]] = {}
    for path in output.glob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            found[row["img_path"]] = row["img_tokens"]
    order = (folder / "list.csv").read_text().splitlines()[1:]
    match = re.search(r"([\d.]+) s of it encoding", done)
    assert match is not None, done
    return np.array([found[path] for path in order]), float(match[1])


def launch(ranks: int, flags: list[Any]) -> str:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks,
        "-m", "tokenizer.image_tokenization", *flags,
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def near_ties(tokenizer: ImageTokenizer, paths: list[str], different: np.ndarray[Any, Any]) -> int:
    """How many of the places that differ have two codes about equally near."""
    found = 0
    for row in sorted({int(r) for r, _ in different}):
        pixels = tokenizer.pixels(open_image(paths[row]))[None]
        with torch.inference_mode():
            _, ties = tokenizer.vqgan.quantize.codes_and_ties(tokenizer.vqgan.latents(pixels))
        found += sum(bool(ties[0, place]) for r, place in different if r == row)
    return found


def decoding(tokenizer: ImageTokenizer, codes: np.ndarray[Any, Any]) -> dict[str, float]:
    """Seconds a picture of codes to pixels: the published layout of memory, and ours."""
    plain = VQGAN(CHAMELEON).eval()
    plain.load_state_dict(tokenizer.vqgan.state_dict())
    given = torch.from_numpy(codes.astype(np.int64))

    def timed(decode: Any) -> float:
        decode(given[:1])
        start = time.perf_counter()
        decode(given)
        return (time.perf_counter() - start) / len(given)

    with torch.inference_mode():
        one = timed(plain.decode)
    return {"decode_plain_s": one, "decode_ours_s": timed(tokenizer.decode_pixels)}


def memory(options: Options, folder: Path) -> dict[str, Any]:
    """Peak memory of a rank over lists of different lengths, with a small network."""
    ckpt = random_checkpoint(folder, SMALL)
    Image.new("RGB", (16, 16), (200, 30, 90)).save(folder / "one.bmp")
    peaks: dict[str, float] = {}
    for rows in options.rows:
        listed = folder / f"{rows}.csv"
        with open(listed, "w", encoding="utf-8") as file:
            file.write("img_path,caption\n")
            file.writelines(f"{folder}/./one.bmp,row {i} of many\n" for i in range(rows))
        before = [
            sys.executable, "-c",
            # VmHWM: ru_maxrss of a process starts at what its parent held when it forked.
            "import re, sys; from tokenizer.image_tokenization import main; s = main(); "
            "own = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]; "
            "print('peak', int(own) / 1024); sys.exit(s)",
        ]  # fmt: skip
        flags = ["--input", listed, "--output", folder / f"out{rows}", "--ckpt", ckpt]
        done = subprocess.run(
            [*before, *map(str, flags), "--partition_size", "500", "--keep_columns"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        peaks[str(rows)] = float(done.stdout.split("peak")[-1])
        print(f"{rows} rows: {peaks[str(rows)]:.0f} MB at the most")
    return {"benchmark": "image_tokenization_memory", "peak_mb": peaks}


if __name__ == "__main__":
    sys.exit(main())
