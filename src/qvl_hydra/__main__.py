"""`python -m qvl_hydra`."""

from qvl_hydra.entry.app import main

if __name__ == "__main__":
    main()
