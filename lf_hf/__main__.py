"""`python -m lf_hf`, which launchers can start on every process, is the command `lf-hf`."""

import sys

from lf_hf_command import main

if __name__ == "__main__":
    sys.exit(main())
