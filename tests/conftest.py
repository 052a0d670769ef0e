"""Set-up of all tests: no network, quiet libraries, one thread where that is faster."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
