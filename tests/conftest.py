import sys
from pathlib import Path

import torch

# Tests share tiny models; they are support code, found as ``tiny_models`` from every test folder.
sys.path.insert(0, str(Path(__file__).parent))
# Tiny models gain nothing from threads, and lose much where cores are shared.
torch.set_num_threads(1)
