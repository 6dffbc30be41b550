"""``python -m tunesmith``: the command line where its script is not on the path."""

from tunesmith.cli.main import main

if __name__ == "__main__":
    main()
