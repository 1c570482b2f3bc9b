"""`python -m fulmen` is the program."""

from fulmen.cli.main import main

if __name__ == "__main__":
    main()
