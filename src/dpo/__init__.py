"""Direct Preference Optimization: to read, to run on your own preference data, and to trust.

Start reading at `dpo.core.losses`; the equation is there.
"""

__version__ = "0.1.0"
