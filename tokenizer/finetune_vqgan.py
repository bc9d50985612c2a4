"""Goes on training a VQGAN on one's own pictures.

In: a checkpoint (or a folder with vqgan.yaml and vqgan.ckpt) and an image list. Out: a folder
with `tokenizer/vqgan.yaml` and `tokenizer/vqgan.ckpt` in Chameleon's layout, `log.jsonl`, grids
of originals above reconstructions, and `state.pt`, from which a killed run goes on exactly.

    torchrun --nproc-per-node=2 -m tokenizer.finetune_vqgan \
        --input pictures --ckpt tiny --output finetuned --steps 200 --trainable decoder

With `--trainable all` the codes change their meaning: pictures have to be tokenized again, and
a decoder that was trained on the old codes is refused. `--trainable decoder` changes no code.

The same as `medley finetune-vqgan`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("finetune-vqgan", argv, prog="tokenizer.finetune_vqgan")


if __name__ == "__main__":
    sys.exit(main())
