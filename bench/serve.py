"""A load on a running server, or the table of one GPU against its peers.

python bench/serve.py --num-prompts 100 --request-rate 4      as `twinfer bench serve`; see `--help`
python bench/serve.py --table h200 [--only decode,ttft]       see bench/table_h200.py
"""

from __future__ import annotations

import sys
from pathlib import Path

# in place of this folder: bench/kernels.py is no library
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.entrypoints.cli import main

if __name__ == "__main__":
    if sys.argv[1:2] == ["--table"]:
        from bench import table_h200

        if sys.argv[2:3] != ["h200"]:
            sys.exit("--table: only h200 is known")
        sys.exit(table_h200.main(sys.argv[3:]))
    sys.exit(main(["bench", "serve", *sys.argv[1:]]))
