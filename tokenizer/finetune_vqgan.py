"""Fine-tunes a VQGAN on your images.

Input: a checkpoint (or a folder with vqgan.yaml and vqgan.ckpt) and an image list. Output: a
folder with `tokenizer/vqgan.yaml` and `tokenizer/vqgan.ckpt` in Chameleon's layout, `log.jsonl`,
grids of originals above reconstructions, `errors.jsonl`, and `state.pt`. The same command resumes
an interrupted run from `state.pt` with identical weights.

    torchrun --nproc-per-node=2 -m tokenizer.finetune_vqgan \
        --input images --ckpt tiny --output finetuned --steps 200 --trainable decoder

`--trainable all` changes the meaning of the image codes: tokenize the images again. A decoder that
was trained on the old codes is refused. `--trainable decoder` changes no image code.

Same as `medley finetune-vqgan`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("finetune-vqgan", argv, prog="tokenizer.finetune_vqgan")


if __name__ == "__main__":
    sys.exit(main())
