"""`python -m sam_poll` is `sam-poll`."""

from sam_poll.cli.main import main

if __name__ == "__main__":
    main()
