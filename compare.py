"""The same as `linpass compare`."""

import sys

from linpass.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
