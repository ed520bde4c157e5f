"""The command line: fit, evaluate, list, show, promote, rollback, export, import; ``--help`` shows examples."""

from ood_runners.cli import main

if __name__ == "__main__":
    main()
