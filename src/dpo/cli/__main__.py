"""`python -m dpo.cli`, the same as `dpo`."""

from dpo.cli import main

if __name__ == "__main__":
    main()
