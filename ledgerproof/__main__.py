"""`python -m ledgerproof` is the command `ledgerproof`."""

from ledgerproof.cli import main

if __name__ == "__main__":
    main()
