"""What the preprocessing released with Wan2.2-Animate made of synthetic bodies and videos."""

import json
import os
from pathlib import Path
from typing import Any

POSE_DIR = Path(os.environ.get("EVERANIMATE_POSE_DIR") or Path(__file__).parent / "golden" / "pose")
GOLDEN: dict[str, Any] = json.loads((POSE_DIR / "pose_golden.json").read_text(encoding="utf-8"))
