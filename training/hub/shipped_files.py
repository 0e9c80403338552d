"""The files that a checkpoint needs besides its weights, so that pipeline and endpoint work without this package.

Knows nothing of training and of the Hub: it only adds files to a folder that `save_pretrained` wrote.
"""

import json
import shutil
from pathlib import Path

import modeling_dcm
from modeling_dcm.pipeline_dcm import CUSTOM_PIPELINES

HANDLER = "handler.py"
PIPELINE = "pipeline_dcm.py"


def add_shipped_files(folder: Path) -> None:
    """Add pipeline, endpoint handler, and the pipeline's entry in ``config.json``; what is there stays as it is."""
    source = Path(modeling_dcm.__file__).parent
    for name in (HANDLER, PIPELINE):
        if not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if "custom_pipelines" not in config:
        path.write_text(json.dumps({**config, "custom_pipelines": CUSTOM_PIPELINES}, indent=2, sort_keys=True) + "\n")
