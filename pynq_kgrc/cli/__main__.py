"""python -m pynq_kgrc.cli"""

import sys

from pynq_kgrc.cli import main

sys.exit(main())
