"""`python -m flowdistill` is the console script."""

from flowdistill.cli import main

main()
