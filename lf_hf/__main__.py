"""`python -m lf_hf`, which launchers can start: the command line."""

import sys

from lf_hf_command import main

sys.exit(main())
