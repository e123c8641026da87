"""`python -m cmt_fast` and `torchrun -m cmt_fast`: the `cmt` command."""

import sys

from cmt_fast.cli import main

sys.exit(main())
