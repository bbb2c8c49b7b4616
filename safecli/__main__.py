"""`python -m safecli`, as `accelerate launch -m safecli train` calls it."""

from safecli.cli import main

main()
