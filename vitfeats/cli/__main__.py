"""So that ``python -m vitfeats.cli`` runs it."""

import sys

from vitfeats.cli.entry import main

sys.exit(main())
