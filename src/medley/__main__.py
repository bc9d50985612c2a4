"""`python -m medley VERB`, and `torchrun -m medley VERB` on several GPUs."""

import sys

from medley.cli import main

if __name__ == "__main__":
    sys.exit(main())
