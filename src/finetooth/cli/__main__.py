"""`python -m finetooth.cli` is the `finetooth` command."""

from finetooth.cli.main import main

main()
