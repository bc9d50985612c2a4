"""Speed of encoding images, compared with transformers' ChameleonVQVAE at Chameleon's sizes.

    python benchmarks/image_tokenization.py --images ../shared/data/vqa_rad/images --limit 24

Baseline: transformers' ChameleonVQVAE in float32, one image at a time in a loop with PIL
preprocessing, as in MedMax. Medley: `torchrun -m tokenizer.image_tokenization` with one rank per
core (or GPU), timed from the first image to the last partition. The start of Python and the loading
of weights are excluded on both sides. All codes are compared; a differing code whose two nearest
codebook vectors have almost equal distances counts as a near tie. TF32 is off in both. `--rows`
measures the peak memory for lists of given lengths with a small network instead.
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
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image

from medley.images.preprocess import Preprocessing, open_image
from medley.utils.cli_options import Alias, run_program
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
        images: folder of images
        limit: use only the first N images
        ranks: number of Medley's processes; by default one per core or GPU
        trained: trained checkpoint for comparing bfloat16 codes with float32 codes
        compile: compile Medley's encoder
        rows: measure the peak memory for lists of these lengths instead
    """

    aliases: ClassVar = {"pictures": Alias("images")}  # alias
    images: Path
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
    """A folder with only a VQGAN, with random weights."""
    torch.manual_seed(0)
    write_vqgan(folder / "ckpt" / "tokenizer", VQGAN(config), Preprocessing())
    return folder / "ckpt"


def speed(options: Options, folder: Path, device: str) -> dict[str, Any]:
    ckpt = random_checkpoint(folder, CHAMELEON)
    paths = sorted(str(p) for p in options.images.iterdir())[: options.limit]
    (folder / "list.csv").write_text("img_path\n" + "".join(f"{p}\n" for p in paths))
    ranks = options.ranks or torch.cuda.device_count() or os.cpu_count() or 1
    expected, baseline_seconds = run_baseline(ckpt, paths, device)
    print(f"transformers, float32, one by one: {baseline_seconds / len(paths):.2f} s per image")
    result: dict[str, Any] = {
        "benchmark": "image_tokenization", "images": len(paths), "ranks": ranks, "device": device,
        "baseline_s_per_image": baseline_seconds / len(paths),
    }  # fmt: skip
    tokenizer = ImageTokenizer.from_checkpoint(ckpt)
    for dtype in ("float32", "bfloat16"):
        codes, seconds = run_medley(options, folder, ckpt, dtype, ranks, len(paths))
        different = np.argwhere(codes != expected)
        ties = near_ties(tokenizer, paths, different) if dtype == "float32" else 0
        result |= {
            f"{dtype}_s_per_image": seconds / len(paths),
            f"{dtype}_times_faster": baseline_seconds / seconds,
            f"{dtype}_equal_codes": float((codes == expected).mean()),
            f"{dtype}_codes_that_differ": len(different),
            f"{dtype}_near_ties_among_them": ties,
        }
        print(
            f"medley, {dtype}: {seconds / len(paths):.2f} s per image, "
            f"{baseline_seconds / seconds:.2f} times faster"
        )
    trained = [
        ImageTokenizer.from_checkpoint(options.trained, dtype=dtype).encode(open_images(paths))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    result["bfloat16_equal_codes_trained"] = float((trained[0] == trained[1]).float().mean())
    result |= decoding(tokenizer, expected[:2])
    return result


def open_images(paths: list[str]) -> list[Image.Image]:
    return [open_image(path) for path in paths]


def run_baseline(ckpt: Path, paths: list[str], device: str) -> tuple[np.ndarray[Any, Any], float]:
    """Codes and seconds of transformers' encoder in a loop, after one image as warm-up."""
    vqgan = VQGAN(CHAMELEON)
    vqgan.load_state_dict(
        torch.load(ckpt / "tokenizer/vqgan.ckpt", weights_only=True)["state_dict"]
    )
    fields = transformers.ChameleonVQVAEConfig(**to_hugging_face_config(CHAMELEON))
    reference = transformers.ChameleonVQVAE._from_config(fields)
    reference.load_state_dict({k: v for k, v in vqgan.state_dict().items() if "decoder." not in k})
    reference = reference.eval().to(device)
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
            return reference.encode(pixels.to(device)).image_tokens.reshape(-1).tolist()

    encode(paths[0])
    start = time.perf_counter()
    codes = np.array([encode(path) for path in paths])
    return codes, time.perf_counter() - start


def run_medley(
    options: Options, folder: Path, ckpt: Path, dtype: str, ranks: int, images: int
) -> tuple[np.ndarray[Any, Any], float]:
    """Codes and seconds of the command, by its own clock without the start of Python."""
    output = folder / dtype
    done = launch(ranks, [
        "--input", folder / "list.csv", "--output", output, "--ckpt", ckpt, "--dtype", dtype,
        "--bs", 4 if not torch.cuda.is_available() else 64,
        "--partition_size", max(1, -(-images // ranks)),
        *(["--compile"] if options.compile else []),
    ])  # fmt: skip
    codes: dict[str, list[int]] = {}
    for path in output.glob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            codes[row["img_path"]] = row["img_tokens"]
    order = (folder / "list.csv").read_text().splitlines()[1:]
    match = re.search(r"([\d.]+) s of it encoding", done)
    assert match is not None, done
    return np.array([codes[path] for path in order]), float(match[1])


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
    """Number of differing positions whose two nearest codes have almost equal distances."""
    count = 0
    for row in sorted({int(r) for r, _ in different}):
        pixels = tokenizer.pixels(open_image(paths[row]))[None]
        with torch.inference_mode():
            _, ties = tokenizer.vqgan.quantize.codes_and_ties(tokenizer.vqgan.latents(pixels))
        count += sum(bool(ties[0, position]) for r, position in different if r == row)
    return count


def decoding(tokenizer: ImageTokenizer, codes: np.ndarray[Any, Any]) -> dict[str, float]:
    """Seconds per image of decoding, with the reference's memory layout and with Medley's."""
    plain = VQGAN(CHAMELEON).eval()
    plain.load_state_dict(tokenizer.vqgan.state_dict())
    tensor = torch.from_numpy(codes.astype(np.int64))

    def timed(decode: Any) -> float:
        decode(tensor[:1])
        start = time.perf_counter()
        decode(tensor)
        return (time.perf_counter() - start) / len(tensor)

    with torch.inference_mode():
        seconds = timed(plain.decode)
    return {"decode_plain_s": seconds, "decode_ours_s": timed(tokenizer.decode_pixels)}


def memory(options: Options, folder: Path) -> dict[str, Any]:
    """Peak memory of one rank for lists of different lengths, with a small network."""
    ckpt = random_checkpoint(folder, SMALL)
    Image.new("RGB", (16, 16), (200, 30, 90)).save(folder / "one.bmp")
    peaks: dict[str, float] = {}
    for rows in options.rows:
        list_file = folder / f"{rows}.csv"
        with open(list_file, "w", encoding="utf-8") as file:
            file.write("img_path,caption\n")
            file.writelines(f"{folder}/./one.bmp,row {i} of many\n" for i in range(rows))
        program = [
            sys.executable, "-c",
            # VmHWM, since ru_maxrss starts at the memory of the parent process at the fork.
            "import re, sys; from tokenizer.image_tokenization import main; s = main(); "
            "own = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]; "
            "print('peak', int(own) / 1024); sys.exit(s)",
        ]  # fmt: skip
        flags = ["--input", list_file, "--output", folder / f"out{rows}", "--ckpt", ckpt]
        done = subprocess.run(
            [*program, *map(str, flags), "--partition_size", "500", "--keep_columns"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        peaks[str(rows)] = float(done.stdout.split("peak")[-1])
        print(f"{rows} rows: {peaks[str(rows)]:.0f} MB peak")
    return {"benchmark": "image_tokenization_memory", "peak_mb": peaks}


if __name__ == "__main__":
    sys.exit(main())
