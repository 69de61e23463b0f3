"""Print the folder of this package's tasks, for `lmms-eval --include_path`."""

import importlib.util
import sys
from pathlib import Path

if __name__ == "__main__":
    if importlib.util.find_spec("lmms_eval") is None:
        sys.exit("flexattn_cuda.evaluation: lmms_eval is not installed; run: pip install 'flexattn_cuda[eval]'")
    print(Path(__file__).parent / "tasks")
