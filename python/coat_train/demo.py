"""`python -m coat_train.demo` is `coat demo`."""

import sys

from .cli import app

if __name__ == "__main__":
    app(["demo", *sys.argv[1:]])
