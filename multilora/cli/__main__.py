"""`python -m multilora.cli`, the same as `multilora`."""

from multilora.cli import main

main()
