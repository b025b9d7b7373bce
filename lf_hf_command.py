"""The command `lf-hf`. It lies outside the package, so that Ctrl-C gets one line while the package is imported, too."""

import sys


def main() -> int:
    """Import `lf_hf.cli`, which takes seconds, and run it."""
    try:
        from lf_hf.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("lf-hf: interrupted.", file=sys.stderr)
        return 130
