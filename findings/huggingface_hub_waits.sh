#!/usr/bin/env bash
# huggingface_hub 2.4.0: `etag_timeout` bounds neither download. With no hub at the address, `hf_hub_download` tries
# six times (1 + 2 + 4 + 8 + 8 s of waiting), and so does `snapshot_download` of a commit, while that of a branch fails
# at once. For a hub that takes the connection and never answers, `snapshot_download` waits for ever; `model_info` alone
# keeps its `timeout`. "For ever" is 30 s here.
# Seen: huggingface_hub 2.4.0, no hub: file 25.3 s, commit 24.8 s, branch 0.7 s; silent hub: model_info 2.0 s, snapshot waits on
# Here: before a download the hub is asked with `model_info`, whose timeout holds.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q huggingface_hub==2.4.0
HF_HOME="$work/home" "$work/venv/bin/python" - <<'PYTHON'
import os
import socket
import threading
import time

import huggingface_hub
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

free = socket.create_server(("127.0.0.1", 0))
nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
free.close()
silent = socket.create_server(("127.0.0.1", 0))
mute = f"http://127.0.0.1:{silent.getsockname()[1]}"
seconds = {}
huggingface_hub.utils.logging.set_verbosity_error()


def run(name, call):
    start = time.monotonic()
    try:
        call()
    except Exception:
        seconds[name] = time.monotonic() - start


options = {"endpoint": nobody, "etag_timeout": 1}
calls = {
    "file": lambda: hf_hub_download("owner/name", "config.json", **options),
    "commit": lambda: snapshot_download("owner/name", revision="a" * 40, **options),
    "branch": lambda: snapshot_download("owner/name", **options),
    "model_info": lambda: HfApi(endpoint=mute).model_info("owner/name", timeout=1),
    "snapshot": lambda: snapshot_download("owner/name", endpoint=mute, etag_timeout=1),
}
threads = [threading.Thread(target=run, args=call, daemon=True) for call in calls.items()]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(30)
took = {name: f"{seconds[name]:.1f} s" if name in seconds else "waits on" for name in calls}
print(
    f"huggingface_hub {huggingface_hub.__version__}, no hub: "
    + ", ".join(f"{name} {took[name]}" for name in ("file", "commit", "branch"))
    + "; silent hub: "
    + ", ".join(f"{name} {took[name]}" for name in ("model_info", "snapshot")),
    flush=True,
)
as_before = min(seconds.get("file", 0), seconds.get("commit", 0)) > 20 and "snapshot" not in seconds
os._exit(not (as_before and seconds["branch"] < 10 and seconds["model_info"] < 10))
PYTHON
