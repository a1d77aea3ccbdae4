"""A load on a running server: `python bench/serve.py --num-prompts 100 --request-rate 4`; see `--help`.

The same program as `twinfer bench serve`; here so that the benches lie together.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.entrypoints.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "serve", *sys.argv[1:]]))
