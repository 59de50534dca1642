import os

__version__ = "1.2.1"
__version__ = os.environ.get("STAND_IN_VERSION", __version__)
