#!/usr/bin/env bash
# Measurements on a GPU, in parts that fail alone, each with a limit of its own; key numbers on stdout, JSON in a folder.
#   benchmarks/gpu.sh [--device cpu --smoke] [--out FOLDER] [--data FOLDER] [--seconds S] [--limit S] [checks] [network] [scratch]
# checks: the guarantee (tests, gpu_checks.py); network: against plain SGD and peers; scratch: Tables 1, 2 and 5 on CIFAR-10 in S seconds.
# --data: where cifar10 lies. --limit: seconds of "network". Without a GPU, and without --device cpu, it says so and exits 1.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TQDM_MININTERVAL=15
python="${PYTHON:-python}" out=benchmarks/results data=data/datasets device=cuda smoke='' seconds=400 limit=100 parts=()
while [ $# -gt 0 ]; do
    case "$1" in
        --device) device="$2" && shift 2 ;;
        --out) out="$2" && shift 2 ;;
        --data) data="$2" && shift 2 ;;
        --seconds) seconds="$2" && shift 2 ;;
        --limit) limit="$2" && shift 2 ;;
        --smoke) smoke=--smoke && shift ;;
        checks | network | scratch) parts+=("$1") && shift ;;
        *) echo "gpu.sh: $1: unknown; see its first lines" >&2 && exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(checks network scratch)
if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: PyTorch sees no GPU on this machine; nothing was measured" >&2
    exit 1
fi
mkdir -p "$out"
failed=0
for part in "${parts[@]}"; do
    began=$SECONDS
    echo "== $part"
    case "$part" in
        checks)
            tests=(tests/core/test_precision.py tests/core/test_clipping_network.py tests/core/test_network.py)
            timeout 100 "$python" -m pytest -q -p no:cacheprovider "${tests[@]}" -k "precision or device or there" --tb=short >"$out/gpu-tests.log" 2>&1 || failed=1
            grep -E "^(FAILED|ERROR|E  )|passed|failed|error" "$out/gpu-tests.log" | cut -c1-200 | tail -25
            timeout 150 "$python" benchmarks/gpu_checks.py $smoke --json "$out/gpu-checks.json" 2>&1 | grep --line-buffered -v Warning || failed=1
            ;;
        network)
            sizes=(--inner 5 --repeats 3 --batch 64 16 128 --peers-up-to 16 --autocast)
            [ -z "$smoke" ] || sizes=(--depth 10 --width 1 --views 2 --batch 2 --repeats 1)
            timeout $((limit + 30)) "$python" benchmarks/network.py --device "$device" --convolutions standardised \
                "${sizes[@]}" --limit "$limit" --json "$out/gpu-network.json" 2>"$out/gpu-network.log" || { failed=1 && tail -5 "$out/gpu-network.log"; }
            ;;
        scratch)
            timeout $((seconds + 60)) "$python" benchmarks/gpu_tables.py --device "$device" --data "$data" --seconds "$seconds" $smoke \
                --json "$out/gpu-tables.json" 2>&1 | tr '\r' '\n' | grep --line-buffered -v -E "Warning|%\|" || failed=1
            ;;
    esac
    echo "== $part: $((SECONDS - began)) s"
done
exit "$failed"
