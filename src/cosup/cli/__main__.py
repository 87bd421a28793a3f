"""`python -m cosup.cli`, as launchers of several processes start it."""

from cosup.cli import main

main()
