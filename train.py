"""The same as `linpass train`."""

import sys

from linpass.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
