"""`python -m fallow` is the program `fallow`."""

from fallow.cli import main

if __name__ == "__main__":
    main()
