"""Hugging Face's layout to Chameleon's: what Chameleon's own inference code loads.

python -m conversion.bin_to_pth --trained_ckpt HF --original_ckpt CHAMELEON --new_ckpt DIR --verify

The same as `medley to-pth`.
"""

import sys

from medley.cli import run_verb


def main(argv: list[str] | None = None) -> int:
    return run_verb("to-pth", argv, prog="conversion.bin_to_pth")


if __name__ == "__main__":
    sys.exit(main())
