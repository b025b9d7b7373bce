"""The command `lf-hf`. It lies outside the package, so that Ctrl-C gets one line while the package is imported, too."""

import os
import signal
import sys

# For progress bars of other packages, which read this when they are imported: a line now and then in a log file.
_IN_A_LOG = {"TQDM_MININTERVAL": "30", "TQDM_DELAY": "30"}
# oneDNN keeps a kernel for each of the last 1024 shapes of products. Fits have many of them once: this is as fast, and
# takes 80 MiB less.
_FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


def main() -> int:
    """Import `lf_hf.cli`, which takes seconds, and run it."""
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.update(_IN_A_LOG | os.environ)
    os.environ.update(_FEW_KERNELS | os.environ)
    # A launcher ends all processes when one has failed: they get to say what is not done, and to remove scratch files.
    signal.signal(signal.SIGTERM, _stop)
    try:
        from lf_hf.cli import main as run
        from lf_hf.runtime.launch import leave_process_group

        code = run()
        if code == 0:  # after a failure others may still wait
            leave_process_group()
        return code
    except KeyboardInterrupt:
        print("lf-hf: interrupted.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing catches what is raised while Python ends


def _stop(*_: object) -> None:
    raise KeyboardInterrupt
