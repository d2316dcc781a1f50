"""The optimizers of nanoNorm under one name: from nanonorm import AdamCPR.

Installed, this file is nanonorm/__init__.py, with cpr.py and kernels/ beside it. In the checkout
`__path__` makes the same package of it. kernels/ has no __init__.py, so that Hugging Face's package
`kernels`, where it is installed, is found before our folder.
"""

import os
import sys

__version__ = '1.0.0.dev0'  # CHANGELOG.md
__path__ = [os.path.dirname(__file__)]

from nanonorm.cpr import AdamCPR, AdamH, AdamW, AdamWN  # noqa: E402  (found by __path__)

__all__ = ['AdamCPR', 'AdamH', 'AdamW', 'AdamWN']

if os.path.basename(__file__) == 'nanonorm.py':
    # In the checkout `import cpr` gives the same module and classes. It does so even if it came
    # first: import returns what sys.modules holds once the file, which imports us, has run.
    sys.modules['cpr'] = sys.modules['nanonorm.cpr']
