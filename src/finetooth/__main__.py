"""`python -m finetooth` is the command `finetooth`."""

from finetooth.cli.main import main

if __name__ == "__main__":
    main()
