"""`python -m qvl_hydra` and the command `qvl-hydra`."""

import sys

from qvl_hydra.entry.process import STOPPED, WRONG_INPUT


def main() -> None:
    """Run the command line, and exit; what stops it while modules are still read is told without a traceback, too."""
    try:
        from qvl_hydra.entry.app import main as run

        run()
    except KeyboardInterrupt:
        print("stopped")
        sys.exit(STOPPED)
    except MemoryError:
        print("error: memory ran out before anything was begun")
        sys.exit(WRONG_INPUT)


if __name__ == "__main__":
    main()
