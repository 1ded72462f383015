"""``python -m cwdpo``, and what ``accelerate launch -m cwdpo`` starts."""

from cwdpo.cli.main import main

if __name__ == "__main__":
    main()
