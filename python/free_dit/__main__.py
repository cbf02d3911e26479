"""``python -m free_dit``."""

from free_dit.cli import main

if __name__ == "__main__":
    main()
