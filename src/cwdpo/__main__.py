"""The entry point of ``cwdpo``, ``python -m cwdpo`` and ``accelerate launch -m cwdpo``."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line. An interrupt while it is imported ends the process without a traceback."""
    asked = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in a shell's background job
    if asked:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cwdpo.cli.main import main as command

    try:
        if asked:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command()
    except KeyboardInterrupt:  # before the command answers them itself
        sys.exit(130)


if __name__ == "__main__":
    main()
