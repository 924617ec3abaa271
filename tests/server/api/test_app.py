"""What the application loads."""

from __future__ import annotations

import subprocess
import sys


def test_api_imports_no_torch():
    code = "import sys, server.api.app; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
