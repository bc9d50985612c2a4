"""Makes the embedded model `tiny` from nothing: VQGAN, text tokenizer, decoder.

In: nothing but seeds; the data are drawn scans (`medley.phantoms`). Out: a checkpoint in
Chameleon's layout and `training_log.json` with the curves. On 2 cores it takes an hour and a half:

    python -m training.make_tiny --output build/tiny

The recipe and its parts are in `training/tiny/`. A run that was stopped goes on behind the last
part that was whole, the decoder from its last save.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from medley.checkpoints.chameleon import ModelDims, write_checklist, write_model
from medley.data.vocabulary import TextTokenizer
from medley.doctor import SELF_TEST, self_test_values
from medley.errors import UserError
from medley.modeling.chameleon import ChameleonForConditionalGeneration
from medley.utils.cli_options import resolved, run_program
from medley.utils.files import atomic_file, write_json
from medley.utils.malloc import keep_freed_memory
from medley.vqgan.files import HUGGING_FACE_PREFIX, read_vqgan, write_vqgan
from training.tiny.decoder import train_decoder
from training.tiny.recipe import Options
from training.tiny.text import make_tokenizer
from training.tiny.vqgan import train_vqgan, with_codes_in_use


def save_decoder(options: Options, decoder: ChameleonForConditionalGeneration) -> None:
    config = decoder.config
    sizes = ModelDims(
        width=config.hidden_size, layers=config.num_hidden_layers,
        heads=config.num_attention_heads, key_value_heads=config.num_key_value_heads,
        feed_forward=config.intermediate_size, vocabulary=config.vocab_size,
        norm_eps=config.rms_norm_eps, rope_theta=config.rope_parameters["rope_theta"],
        swin_norm=False, context=config.max_position_embeddings, shards=1,
    )  # fmt: skip
    state = {
        name: tensor.detach().to(torch.bfloat16)
        for name, tensor in decoder.state_dict().items()
        if not name.startswith(HUGGING_FACE_PREFIX)
    }
    write_model(options.output / "models" / "tiny", sizes, lambda: iter(state.items()))


def log_of_the_same(options: Options, log_file: Path) -> dict[str, Any]:
    """The log of what was begun. Raises UserError where that was begun with other options."""
    found: dict[str, Any] = json.loads(log_file.read_text())
    for name, value in resolved(options).items():
        before = found["options"].get(name)
        if name != "output" and before != value:
            raise UserError(
                f"{log_file}: begun with --{name} {before}, not {value}; give the same options to "
                "go on, or another --output to begin anew"
            )
    return {name: curve for name, curve in found.items() if name != "options"}


def work(options: Options) -> None:
    """Each part is kept as soon as it is made; a second start goes on behind the last one."""
    keep_freed_memory()
    tokenizer_folder = options.output / "tokenizer"
    log_file = options.output / "training_log.json"
    log: dict[str, Any] = {"options": resolved(options), "vqgan": [], "decoder": []}
    if log_file.exists():
        log |= log_of_the_same(options, log_file)
    elif tokenizer_folder.exists():
        raise UserError(
            f"{tokenizer_folder}: there, without {log_file.name}; give another --output"
        )
    else:
        write_json(log_file, log)
    if (tokenizer_folder / "vqgan.ckpt").exists():
        vqgan, _ = read_vqgan(tokenizer_folder)
    else:
        log["vqgan"] = []
        vqgan = with_codes_in_use(train_vqgan(options, log["vqgan"]), options.active_codes)
        write_json(log_file, log)
        write_vqgan(tokenizer_folder, vqgan, "crop")
    tokenizer_file = tokenizer_folder / "text_tokenizer.json"
    if not tokenizer_file.exists():
        with atomic_file(tokenizer_file) as temporary:
            temporary.write_text(json.dumps(make_tokenizer(options), ensure_ascii=False))
    if not (options.output / SELF_TEST).exists():  # written last: what is there is whole
        tokenizer = TextTokenizer.from_file(tokenizer_file)
        save = options.output / "decoder.part"
        decoder = train_decoder(options, tokenizer, vqgan, log, save)
        save_decoder(options, decoder)
        write_json(log_file, log)
        write_json(options.output / SELF_TEST, self_test_values(options.output))
        save.unlink(missing_ok=True)
    write_checklist(tokenizer_folder)
    print(f"{options.output} is whole; copy it to src/medley/tiny to ship it")


def main(argv: list[str] | None = None) -> int:
    return run_program("training.make_tiny", Options, work, argv)


if __name__ == "__main__":
    sys.exit(main())
