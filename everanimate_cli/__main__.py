"""`python -m everanimate_cli` is the same program as `everanimate`."""

from everanimate_cli.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
