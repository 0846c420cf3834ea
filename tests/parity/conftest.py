import sys
from pathlib import Path

# The harness is test support, not part of the package: it is imported by its own folder.
sys.path.insert(0, str(Path(__file__).parent))
