"""``python -m cwdpo``; also used by ``accelerate launch -m cwdpo``."""

from cwdpo.cli.main import main

if __name__ == "__main__":
    main()
