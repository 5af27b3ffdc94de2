"""``python -m recipes VERB``: the command line of a clone that is not installed."""

import sys

from recipes.cli import main

sys.exit(main())
