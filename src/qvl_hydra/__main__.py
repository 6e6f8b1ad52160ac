"""`python -m qvl_hydra` and the command `qvl-hydra`."""

import sys


def main() -> None:
    """Run the command line, and exit; Ctrl-C is told without a traceback while modules are still read, too."""
    try:
        from qvl_hydra.entry.app import main as run

        run()
    except KeyboardInterrupt:
        print("stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
