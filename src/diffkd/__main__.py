"""`python -m diffkd`, where the command is not on the path, as under `torchrun -m diffkd`."""

import sys

from diffkd.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
