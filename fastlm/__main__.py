"""``python -m fastlm``: the command line."""

from fastlm.cli import main

main()
