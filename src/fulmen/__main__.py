"""`python -m fulmen`: the program, where the installed one is not on the path."""

from fulmen.cli.main import main

if __name__ == "__main__":
    main()
