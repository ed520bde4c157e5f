"""The command line: fit, evaluate, list, show, promote, rollback, export, import, push, pull, prune; see ``--help``."""

from ood_runners.cli import main

if __name__ == "__main__":
    main()
