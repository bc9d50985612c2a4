"""Makes the embedded model part by part, resuming after the last complete part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from medley.checkpoints.chameleon import write_checklist, write_model
from medley.data.vocabulary import TextTokenizer
from medley.doctor import SELF_TEST, self_test_values
from medley.errors import UserError
from medley.images.preprocess import Preprocessing
from medley.modeling.chameleon import ChameleonForConditionalGeneration
from medley.modeling.dims import ModelDims
from medley.utils.cli_options import resolved
from medley.utils.files import atomic_file, read_json, write_json
from medley.utils.malloc import keep_freed_memory
from medley.utils.run_identity import check_same_run
from medley.vqgan.files import HUGGING_FACE_PREFIX, read_vqgan, write_vqgan
from training.tiny.decoder import train_decoder
from training.tiny.recipe import Options
from training.tiny.text import make_tokenizer
from training.tiny.vqgan import train_vqgan, truncate_codebook


def save_decoder(options: Options, decoder: ChameleonForConditionalGeneration) -> None:
    """Writes the decoder's weights in Chameleon's layout, as bfloat16."""
    dims = ModelDims.from_config(decoder.config)
    state = {
        name: tensor.detach().to(torch.bfloat16)
        for name, tensor in decoder.state_dict().items()
        if not name.startswith(HUGGING_FACE_PREFIX)
    }
    write_model(options.output / "models" / "tiny", dims, lambda: iter(state.items()))


def read_log(options: Options, log_file: Path) -> dict[str, Any]:
    """The log of an interrupted run. Raises UserError if that run had other options."""
    log: dict[str, Any] = read_json(log_file)
    check_same_run(log.pop("options"), resolved(options), log_file, ignored=("output",))
    return log


def make_tiny(options: Options) -> None:
    """Trains the VQGAN, the text tokenizer and the decoder; saves each part when it is complete."""
    keep_freed_memory()
    tokenizer_folder = options.output / "tokenizer"
    log_file = options.output / "training_log.json"
    log: dict[str, Any] = {"options": resolved(options), "vqgan": [], "decoder": []}
    if log_file.exists():
        log |= read_log(options, log_file)
    elif tokenizer_folder.exists():
        raise UserError(
            f"{tokenizer_folder}: The folder exists without {log_file.name}. Use another --output."
        )
    else:
        write_json(log_file, log)
    if (tokenizer_folder / "vqgan.ckpt").exists():
        vqgan, _ = read_vqgan(tokenizer_folder)
    else:
        log["vqgan"] = []
        vqgan = truncate_codebook(train_vqgan(options, log["vqgan"]), options.active_codes)
        write_json(log_file, log)
        write_vqgan(tokenizer_folder, vqgan, Preprocessing(exif_orientation=True))
    tokenizer_file = tokenizer_folder / "text_tokenizer.json"
    if not tokenizer_file.exists():
        with atomic_file(tokenizer_file) as temporary:
            temporary.write_text(json.dumps(make_tokenizer(options), ensure_ascii=False))
    if not (options.output / SELF_TEST).exists():  # written last, so its presence means complete
        tokenizer = TextTokenizer.from_file(tokenizer_file)
        checkpoint = options.output / "decoder.part"
        decoder = train_decoder(options, tokenizer, vqgan, log, checkpoint)
        save_decoder(options, decoder)
        write_json(log_file, log)
        write_json(options.output / SELF_TEST, self_test_values(options.output))
        checkpoint.unlink(missing_ok=True)
    write_checklist(tokenizer_folder)
    print(f"{options.output} is complete; copy it to src/medley/tiny to ship it")
