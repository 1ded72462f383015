"""``python -m cwdpo``, and what ``accelerate launch -m cwdpo`` starts."""

from cwdpo.cli import main

if __name__ == "__main__":
    main()
