#!/usr/bin/env bash
# All GPU measurements in one call of under nine minutes; one table last. Without a GPU it says so and exits 1.
#   benchmarks/gpu.sh [folder for the JSON files, default benchmarks/results]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python="${PYTHON:-python}"
out="${1:-benchmarks/results}"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: PyTorch sees no GPU on this machine; nothing was measured" >&2
    exit 1
fi
mkdir -p "$out"
"$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'
# Each part has its own limit, so that the whole stays under nine minutes and a slow peer costs no other row.
checks=passed failed=0
timeout 120 "$python" -m pytest -q tests/core/test_clipping_network.py -k device >"$out/gpu-tests.log" 2>&1 || checks=FAILED
[ "$checks" = passed ] || failed=1
timeout 400 "$python" benchmarks/network.py --device cuda --autocast --convolutions standardised --inner 5 --repeats 3 \
    --batch 64 16 128 32 256 --peers-up-to 16 --limit 330 --json "$out/network-gpu.json" >"$out/gpu.txt" || failed=1
echo "checks of the engines on this GPU: $checks ($out/gpu-tests.log)"
echo "plain SGD, the engines and (at 16 examples) the peers: WRN-16-4, 16 views, bfloat16, channels_last"
cat "$out/gpu.txt"
exit "$failed"
