"""`python -m dsv3_lightning VERB …`, whatever scripts are installed."""

import sys

from dsv3_lightning.cli import main

sys.exit(main())
