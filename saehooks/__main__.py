"""``python -m saehooks``: the commands, as ``torchrun -m saehooks fit ...`` starts them."""

import sys

from saehooks.cli import main

if __name__ == "__main__":
    sys.exit(main())
