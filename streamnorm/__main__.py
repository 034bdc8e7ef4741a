"""``python -m streamnorm`` is the command ``streamnorm``."""

import sys

from streamnorm.lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
