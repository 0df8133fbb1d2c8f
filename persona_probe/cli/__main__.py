"""`python -m persona_probe.cli`, for where the entry point is not on the path."""

from persona_probe.cli import main

main()
