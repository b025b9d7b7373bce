"""`python -m lf_hf.evaluate ...` is `lm_eval ...` with the models of lf_hf, also where no start-up file is run."""

from lm_eval.__main__ import cli_evaluate

import lf_hf.evaluate.lm_eval_model  # noqa: F401  # registers them

if __name__ == "__main__":
    cli_evaluate()
